"""A module with the surface of `memfabric_hybrid`, for tests without an NPU. It enforces the library's rules:

a start that failed makes every later call fail (registering with the code -2000), memory is registered by one call and
in whole pieces of 2 MiB, writes block, and there is neither a poll nor a cancel. Writes go from process to process by
process_vm_writev; who has which session is in a folder that the variable FAKE_MEMFABRIC names.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

from pd.abc import BackendContext, TransferBackend

NOT_STARTED, REFUSED = -2000, -1
PIECE = 2 << 20
AT_ONCE = 1024  # the kernel's limit of ranges in a call
_LIBC = ctypes.CDLL(None, use_errno=True)
_PORTS = itertools.count(1)


class _Range(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _folder() -> Path:
    return Path(os.environ["FAKE_MEMFABRIC"])


def create_config_store(url: str) -> int:
    try:
        (_folder() / quote(url, safe="")).open("x").close()
    except FileExistsError:
        return REFUSED
    return 0


class TransferEngine:
    class TransDataOpType(enum.Enum):
        SDMA = 1
        DEVICE_RDMA = 2

    #: What was asked of every engine of this process, in order.
    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self) -> None:
        self._port = os.getpid() * 100 + next(_PORTS)
        self._session = ""
        self._registered = False

    def get_rpc_port(self) -> int:
        return self._port

    def initialize(self, store_url: str, session_id: str, role: str, device_id: int, operation: TransDataOpType) -> int:
        self.calls.append(("initialize", store_url, session_id, role, device_id, operation.name))
        if role not in ("Prefill", "Decode") or not (_folder() / quote(store_url, safe="")).exists():
            os.write(1, b"2026-01-01 ERROR [1-1][FAKE fake.cpp:1 Start] no such store: the driver says no\n")
            return REFUSED
        _LIBC.prctl(0x59616D61, ctypes.c_ulong(-1 & (1 << 64) - 1), 0, 0, 0)  # others may write here
        self._session = session_id
        return 0

    def batch_register_memory(self, addresses: Sequence[int], lengths: Sequence[int]) -> int:
        self.calls.append(("register", list(addresses), list(lengths)))
        if not self._session:
            return NOT_STARTED
        if self._registered or any(value % PIECE for value in (*addresses, *lengths)):
            return REFUSED
        self._registered = True
        ranges = list(zip(addresses, lengths, strict=True))
        (_folder() / quote(self._session, safe="")).write_text(json.dumps([os.getpid(), ranges]))
        return 0

    def batch_transfer_sync_write(
        self, session: str, buffers: Sequence[int], peer_buffers: Sequence[int], lengths: Sequence[int]
    ) -> int:
        if not self._registered:
            return NOT_STARTED
        try:
            pid, ranges = json.loads((_folder() / quote(session, safe="")).read_text())
        except OSError:
            return REFUSED
        for start, length in zip(peer_buffers, lengths, strict=True):
            if not any(begin <= start and start + length <= begin + size for begin, size in ranges):
                return REFUSED
        for first in range(0, len(lengths), AT_ONCE):
            last = first + AT_ONCE
            mine = [_Range(*pair) for pair in zip(buffers[first:last], lengths[first:last], strict=True)]
            theirs = [_Range(*pair) for pair in zip(peer_buffers[first:last], lengths[first:last], strict=True)]
            count = len(mine)
            done = _LIBC.process_vm_writev(
                pid, (_Range * count)(*mine), ctypes.c_ulong(count), (_Range * count)(*theirs), ctypes.c_ulong(count), 0
            )
            if done != sum(lengths[first:last]):
                return REFUSED
        return 0

    def destroy(self) -> None:
        self._session = ""

    def unInitialize(self) -> None:
        self.calls.append(("unInitialize",))


_LIBC.process_vm_writev.restype = ctypes.c_ssize_t


def install(name: str = "memfabric_hybrid") -> ModuleType:
    """Stand where the vendor's module would be imported."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(TransferEngine=TransferEngine, create_config_store=create_config_store)
    sys.modules[name] = module
    return module


def make(context: BackendContext) -> TransferBackend:
    """A factory for the conformance suite: the plugin's own, over this module."""
    from pd_transfer_ascend.backend import AscendBackend

    return AscendBackend(context, install(), os.environ["ASCEND_MF_STORE_URL"], "sdma")
