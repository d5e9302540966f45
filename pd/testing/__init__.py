"""What pd and plugins are tested with. Names are imported when first used: most users need one of them.

`TransferConformance` is the suite that every transfer backend must pass, `PolicySuite` that of routing policies. The
tuples name tests of the former that some engines cannot pass, for its `exceptions`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pd.testing.policy import PolicySuite
    from pd.testing.transfer import TransferConformance
    from pd.testing.transfer_harness import NO_AUTHENTICATION, NO_DIGESTS, NOT_REVOCABLE, ONE_THREAD

__all__ = ["NOT_REVOCABLE", "NO_AUTHENTICATION", "NO_DIGESTS", "ONE_THREAD", "PolicySuite", "TransferConformance"]

_HOMES = {
    "NOT_REVOCABLE": "pd.testing.transfer_harness",
    "NO_AUTHENTICATION": "pd.testing.transfer_harness",
    "NO_DIGESTS": "pd.testing.transfer_harness",
    "ONE_THREAD": "pd.testing.transfer_harness",
    "PolicySuite": "pd.testing.policy",
    "TransferConformance": "pd.testing.transfer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
