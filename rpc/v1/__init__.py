"""Generated from proto/rpc/v1 by `make proto`; not edited by hand."""
