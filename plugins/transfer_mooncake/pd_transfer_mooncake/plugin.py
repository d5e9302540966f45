"""What pd loads: registers `mooncake`. The library is imported by the factory only; its needs are checked before."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pd import hookimpl
from pd.abc import BackendContext, BackendInfo, TransferBackend, missing_rdma_devices
from pd.errors import BackendUnavailable

WHEEL = "the wheel of Mooncake's transfer engine, pip install 'pd-transfer-mooncake[cpu]' (or [cuda12], [cuda13])"

#: What every wheel links to and none brings. What else those for CUDA need is named when they are loaded.
LIBRARIES = {"libibverbs.so.1": "apt-get install libibverbs1"}

#: What Mooncake reads once, when it is imported; what the user has set stays. The core ends a push that takes too long
#: and resets its peer: Mooncake need not be quicker.
DEFAULTS = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TCP_SLICE_SIZE": str(1 << 20),
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "30",
    "MC_TCP_STATUS_TIMEOUT_SEC": "30",
}

PROTOCOL, PROTOCOLS = "PD_MOONCAKE_PROTOCOL", ("tcp", "rdma", "nvlink_intra")


def unavailable() -> str | None:
    """A library and its remedy, or None. Imports nothing of Mooncake."""
    package = find_spec("mooncake")
    folders = [Path(folder) for folder in (package and package.submodule_search_locations) or ()]
    if not any(folder.glob("engine*.so") for folder in folders):
        return WHEEL
    if os.environ.get("MC_LOG_DIR"):
        return "MC_LOG_DIR, unset it: with it Mooncake aborts the process that imports it"
    for library, remedy in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"{library}, {remedy}"
    return None


def refuses(setting: str, value: str) -> str | None:
    """Why this machine cannot do what a device flag asks: Mooncake itself would quietly use TCP instead."""
    if os.environ.get("MC_FORCE_TCP"):
        return "MC_FORCE_TCP is set; unset it to use RDMA"
    wrong = missing_rdma_devices(value)
    return f"{wrong}; leave it out to use TCP" if wrong else None


def load(protocol: str) -> Any:
    """Mooncake's module, with its environment set before it is imported. Raises BackendUnavailable."""
    reason = unavailable()
    if reason:
        raise BackendUnavailable("mooncake", *reason.split(", ", 1))
    if "mooncake.engine" not in sys.modules:
        nvlink = {"MC_INTRA_NVLINK": "1", "MC_INTRANODE_NVLINK": "1"} if protocol == "nvlink_intra" else {}
        for name, value in (DEFAULTS | nvlink).items():
            os.environ.setdefault(name, value)
    try:
        from mooncake import engine
    except ImportError as error:
        raise BackendUnavailable("mooncake", str(error), "install it; the README says where Debian has it") from error
    if protocol == "nvlink_intra" and not engine.SUPPORT_INTRA_NVLINK:
        raise BackendUnavailable("mooncake", "NVLink within a node", "the installed wheel is built without it")
    return engine


def make_mooncake(context: BackendContext) -> TransferBackend:
    """RDMA where a device is named, else what PD_MOONCAKE_PROTOCOL says. Raises BackendUnavailable."""
    devices = context.options.get("ib_device", "")
    asked = os.environ.get(PROTOCOL, "")
    protocol = asked or ("rdma" if devices else "tcp")
    if protocol not in PROTOCOLS:
        raise BackendUnavailable("mooncake", f"{PROTOCOL}={protocol}", f"use one of {', '.join(PROTOCOLS)}")
    if devices and protocol != "rdma":
        raise BackendUnavailable("mooncake", f"{PROTOCOL}={protocol} with an RDMA device", "name one of the two")
    if protocol == "rdma" and (reason := refuses("ib_device", devices)):
        raise BackendUnavailable("mooncake", "--ib-device", reason)
    module = load(protocol)
    from pd_transfer_mooncake.backend import MooncakeBackend

    return MooncakeBackend(context, module, protocol, devices)


@hookimpl
def pd_register_transfer_backends(register: Any) -> None:
    register(
        BackendInfo(
            name="mooncake",
            factory=make_mooncake,
            summary="Mooncake's transfer engine: TCP, RDMA, NVLink within a node",
            accepts=frozenset({"ib_device", "insecure_control_plane"}),
            environment={PROTOCOL: "tcp (default), rdma (default with --ib-device) or nvlink_intra"},
            unavailable=unavailable,
            refuses=refuses,
        )
    )
