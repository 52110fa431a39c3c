"""Words and rules that every part shares. Imports no torch and no grpc."""
