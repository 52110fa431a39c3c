"""Triton kernels. Each function has the shapes of the torch operations that it replaces."""
