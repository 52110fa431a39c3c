"""The prefill worker: computes prompt KV and leases it out."""
