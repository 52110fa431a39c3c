"""The decode worker: fetches KV and generates tokens."""
