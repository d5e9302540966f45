"""Registers the built-in backend."""

from __future__ import annotations

from pd import hookimpl
from pd.abc import BackendContext, BackendInfo, TransferBackend
from pd.hookspecs import RegisterBackend


def make_direct(context: BackendContext) -> TransferBackend:
    from pd.transfer.direct import DirectBackend

    return DirectBackend(context)


@hookimpl
def pd_register_transfer_backends(register: RegisterBackend) -> None:
    register(
        BackendInfo(
            name="direct",
            factory=make_direct,
            summary="built in: shared memory or CUDA IPC on one host, TCP otherwise; needs no third-party engine",
            accepts=frozenset({"transfer_memory", "insecure_control_plane"}),
        )
    )
