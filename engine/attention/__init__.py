"""Attention over the block pool: one interface, several backends."""
