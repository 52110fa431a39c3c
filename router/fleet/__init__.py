"""Streams to the workers and what the workers said over them."""
