"""With what a worker's processes end: an operator of several nodes sees which one is to blame."""

EXIT_FAILED = 1
"""What failed is here."""
EXIT_REFUSED = 2
"""Its settings can't be used, or the leader does not take it."""
EXIT_NODE_LOST = 3
"""Another node of this worker never came, or is gone."""
