"""What pd and plugins are tested with. Names are imported when first used: most users need one of them.

`TransferConformance` is the suite that every transfer backend must pass, `PolicySuite` that of routing policies.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pd.testing.policy import PolicySuite
    from pd.testing.transfer import TransferConformance

__all__ = ["PolicySuite", "TransferConformance"]

_HOMES = {"PolicySuite": "pd.testing.policy", "TransferConformance": "pd.testing.transfer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
