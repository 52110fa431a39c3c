"""KV blocks: the pool that holds them, who holds which, and which are cached."""
