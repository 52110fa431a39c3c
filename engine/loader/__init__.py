"""Brings weights from files, or from a seed, into models."""
