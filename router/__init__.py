"""The HTTP front door: API, tokenizer, placement, request ledger."""
