"""Third-party data planes, and how a cluster is made to use each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest
from cluster_kit import ROOT

from pd.plugins import load_plugins

FABRIC = Path(__file__).parent / "plugins" / "fabric"
STORE = "tcp://127.0.0.1:24673"


@dataclass(frozen=True)
class Plane:
    """`transfer` is the backend's name."""

    transfer: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def require(self) -> None:
        """Skips where the vendor's library is not installed."""
        info = load_plugins().backends().get(self.transfer)
        if info is None:
            pytest.skip(f"{self.transfer}: not installed")
        if self.transfer != "ascend" and (reason := info.unavailable()):
            pytest.skip(f"{self.transfer}: {reason}")


#: `ascend` over the module of the library's surface.
PLANES = {
    "nixl": Plane("nixl"),
    "nixl-tcp": Plane("nixl", {"UCX_TLS": "tcp"}),
    "mooncake": Plane("mooncake"),
    "ascend": Plane("ascend", {"ASCEND_MF_STORE_URL": STORE, "PYTHONPATH": os.pathsep.join((str(FABRIC), ROOT))}),
}


def settings(plane: str, folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and environment of a cluster with this data plane."""
    found = PLANES[plane]
    found.require()
    environment = dict(found.environment)
    if found.transfer == "ascend":
        fabric = folder / "fabric"
        fabric.mkdir()
        (fabric / quote(STORE, safe="")).touch()  # the store, so that it does not matter who starts first
        environment["FAKE_MEMFABRIC"] = str(fabric)
    return ("--transfer", found.transfer), environment
