"""OpenAI's /v1/responses: items in and out, typed events, and responses that are remembered."""
