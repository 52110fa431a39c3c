"""Building blocks that models share. Plain callables over tensors; state is weights only."""
