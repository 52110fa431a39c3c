"""Holds outputs to a grammar: compiling it, following an output through it, masks of tokens."""
