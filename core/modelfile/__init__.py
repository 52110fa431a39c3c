"""Model files: finding, reading, identifying them. Free of torch, so the router may use it."""
