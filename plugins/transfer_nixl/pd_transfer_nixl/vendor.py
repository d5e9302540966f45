"""The vendor's library: whether it is here, what must be set before it is imported, and the import."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from types import ModuleType

from pd.abc import BackendContext, interface_of, missing_rdma_devices
from pd.errors import BackendUnavailable

#: One per CUDA version; a build from source may bring any, or only the plain name.
MODULES = ("nixl_cu12", "nixl_cu13", "nixl")
REMEDY = "pip install 'pd-transfer-nixl[cpu]' (with a GPU [cuda12] or [cuda13])"


def installed() -> list[str]:
    return [name for name in MODULES if importlib.util.find_spec(name) is not None]


def missing() -> str | None:
    """Why the backend cannot be used here, and the remedy; cheap."""
    return None if installed() else f"nixl, {REMEDY}"


def load(device: str) -> ModuleType:
    """NIXL's Python API: for a GPU that of the CUDA version which torch has. Raises BackendUnavailable."""
    names = installed()
    if device != "cpu":
        cuda = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None) or ""
        names.sort(key=lambda name: name != f"nixl_cu{cuda.partition('.')[0]}")
    try:
        api = importlib.import_module(f"{[*names, 'nixl'][0]}._api")
    except (ImportError, OSError) as error:
        raise BackendUnavailable("nixl", str(error), REMEDY) from error
    logger = logging.getLogger("nixl")  # the import made it write to stdout
    logger.handlers.clear()
    logger.propagate = True
    return api


def configure(context: BackendContext) -> None:
    """Environment of this process that NIXL and UCX read at import. What the user has set stays, but for a flag.

    Raises BackendUnavailable for a device or an address that does not exist here.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    if context.device != "cpu":
        # One call of UCX for many descriptors: between GPUs 256 KiB pieces move three times as fast.
        os.environ.setdefault("NIXL_UCX_SGL_ENABLE", "1")
    if devices := context.options.get("ib_device", ""):
        if wrong := missing_rdma_devices(devices):
            raise BackendUnavailable("nixl", "--ib-device", wrong)
        names = (one.strip() for one in devices.split(","))
        os.environ["UCX_NET_DEVICES"] = ",".join(one if ":" in one else f"{one}:1" for one in names)
        return
    # The wheel's module for EFA adapters loads Debian's libibverbs and libnl beside the wheel's own, and the process
    # crashes when it ends (nixl-cu12 1.5.1 with ibverbs-providers).
    os.environ.setdefault("UCX_MODULES", "^efa")
    try:
        interface = interface_of(context.data_host)
    except OSError as error:
        raise BackendUnavailable("nixl", f"address {context.data_host}: {error}", "check --control-host") from error
    if interface:
        os.environ.setdefault("UCX_NET_DEVICES", interface)
