"""Logs, metrics and the stage ledger."""
