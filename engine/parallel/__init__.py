"""One model on several devices of a host: ranks, what they exchange, and who keeps them in step."""
