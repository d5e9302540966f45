"""`pd route`: one HTTP leg from client to decode instance, with the prefill instance named in a header."""
