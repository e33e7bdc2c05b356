"""What a user types: one module a command, each with a ``main`` that reads ``sys.argv``."""
