"""The data plane: the core around a transfer backend, and the built-in backend `direct`."""
