"""Moves KV blocks between processes: the lease protocol and the transports."""
