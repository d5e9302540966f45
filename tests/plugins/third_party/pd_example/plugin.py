"""What pd loads. It imports neither the backend nor anything heavy until they are used."""

from __future__ import annotations

import sys
from typing import Any

from pd import hookimpl
from pd.abc import BackendContext, BackendInfo, TransferBackend
from pd_example.sticky import Sticky


def make_memfd(context: BackendContext) -> TransferBackend:
    from pd_example.memfd import MemfdBackend

    return MemfdBackend(context)


def _unavailable() -> str | None:
    return None if sys.platform == "linux" else "memfd needs Linux; use direct"


@hookimpl
def pd_register_transfer_backends(register: Any) -> None:
    summary = "KV blocks copied through shared memory of one host and one user"
    register(BackendInfo("memfd", make_memfd, summary=summary, unavailable=_unavailable, one_thread=True))


@hookimpl
def pd_register_routing_policies(register: Any) -> None:
    register("sticky", Sticky, summary="prompts with the same beginning go to the same worker")
