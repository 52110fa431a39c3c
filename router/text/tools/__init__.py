"""Function calls in a model's output: one parser per way of writing them, behind one interface."""
