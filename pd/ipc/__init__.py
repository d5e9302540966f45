"""How pd's processes talk: typed messages over ZMQ sockets, and shared memory."""
