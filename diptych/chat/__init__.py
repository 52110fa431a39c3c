"""A small terminal chat against an endpoint."""
