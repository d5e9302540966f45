"""NIXL as a transfer backend of pd. See the README."""
