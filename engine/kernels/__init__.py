"""Decode on a CPU as compiled code: fewer, larger operations than torch has. Optional."""
