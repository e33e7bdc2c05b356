"""What real code does, written down: kernels, collectives, waits and memory, over tensors with or without data."""
