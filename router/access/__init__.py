"""Who may use the router, for what, and how much of it: API keys, limits, tenants."""
