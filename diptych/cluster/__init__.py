"""A whole cluster on one machine: router, prefill and decode workers as child processes."""
