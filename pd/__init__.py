"""pd serves large language models with prefill and decode on separate instances."""

import pluggy

__version__ = "0.1.0"

#: Marks a function as an implementation of one of `pd.hookspecs`.
hookimpl = pluggy.HookimplMarker("pd")

__all__ = ["__version__", "hookimpl"]
