"""A small API server that speaks enough of Kubernetes for kubectl, helm and client libraries."""
