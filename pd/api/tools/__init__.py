"""Tools: what a client offers, how a model's calls are told from its text, and grammars that force calls."""
