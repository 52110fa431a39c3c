"""Dashboards, rules and the metrics reference, built from the metrics that the code declares."""
