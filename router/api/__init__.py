"""The OpenAI-compatible HTTP API over a `router.generation.Generator`."""
