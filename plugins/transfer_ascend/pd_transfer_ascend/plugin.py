"""What pd loads: registers `ascend`. The vendor's library is imported by the factory only."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any

from pd import hookimpl
from pd.abc import BackendContext, BackendInfo, TransferBackend
from pd.errors import BackendUnavailable

#: The first that is installed. They cannot share a process: both bring a module of the same name.
VENDORS = ("memfabric_hybrid", "mf_adapter")

STORE_URL, PROTOCOL = "ASCEND_MF_STORE_URL", "ASCEND_MF_TRANSFER_PROTOCOL"
OVER_MOONCAKE = "ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE"
MOONCAKE = "pd_transfer_mooncake"


def over_mooncake() -> bool:
    return os.environ.get(OVER_MOONCAKE, "").lower() in ("1", "true", "yes")


def unavailable() -> str | None:
    """A library and its remedy, or None. Imports nothing of the vendor."""
    if over_mooncake():
        if find_spec(MOONCAKE) is None:
            return f"{MOONCAKE}, pip install pd-transfer-mooncake, or unset {OVER_MOONCAKE}"
        reason: str | None = importlib.import_module(f"{MOONCAKE}.plugin").unavailable()
        return reason
    if not any(find_spec(name) for name in VENDORS):
        return f"{VENDORS[0]}, pip install 'pd-transfer-ascend[memfabric]'"
    if not os.environ.get(STORE_URL):
        return f"{STORE_URL}, set it to the address of the config store, tcp://HOST:PORT, the same for all instances"
    return None


def make_ascend(context: BackendContext) -> TransferBackend:
    """Raises BackendUnavailable."""
    reason = unavailable()
    if reason:
        raise BackendUnavailable("ascend", *reason.split(", ", 1))
    if over_mooncake():
        backend: TransferBackend = importlib.import_module(f"{MOONCAKE}.plugin").make_mooncake(context)
        return backend
    name = next(name for name in VENDORS if find_spec(name))
    try:
        vendor: Any = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendUnavailable("ascend", f"{name}: {error}", "install CANN and its driver") from error
    from pd_transfer_ascend.backend import AscendBackend

    return AscendBackend(context, vendor, os.environ[STORE_URL], os.environ.get(PROTOCOL) or "sdma")


@hookimpl
def pd_register_transfer_backends(register: Any) -> None:
    register(
        BackendInfo(
            name="ascend",
            factory=make_ascend,
            summary="Ascend NPUs' memory fabric (untested on hardware)",
            accepts=frozenset({"insecure_control_plane"}),
            environment={
                STORE_URL: "address of the config store, tcp://HOST:PORT",
                PROTOCOL: "sdma (default), device_rdma, or another that the library has",
                OVER_MOONCAKE: "true: run over pd-transfer-mooncake instead",
            },
            unavailable=unavailable,
        )
    )
