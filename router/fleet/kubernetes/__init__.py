"""Workers found through the EndpointSlices of a Kubernetes namespace; see docs/discovery.md."""
