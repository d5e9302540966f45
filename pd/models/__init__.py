"""Models: what a directory holds (`info`, `dense`, `checkpoint`: no torch) and how it computes (`llama`, `layers`)."""
