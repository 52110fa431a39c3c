"""Which workers serve a request, and why. Pure: no I/O, no clock of its own."""
