"""What both kinds of worker are made of: a service process, an engine process, a pipe between."""
