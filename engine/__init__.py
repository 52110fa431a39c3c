"""The inference engine that both kinds of worker run. Knows nothing of the network."""
