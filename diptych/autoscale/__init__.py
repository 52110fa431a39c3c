"""Scales the prefill and the decode pool: signals in, a pure policy, the scale subresource out."""
