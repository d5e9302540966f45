"""What pd loads: registers the backend without importing NIXL."""

from __future__ import annotations

from collections.abc import Callable

from pd import hookimpl
from pd.abc import BackendContext, BackendInfo, TransferBackend, missing_rdma_devices
from pd_transfer_nixl.vendor import configure, load, missing


def make_nixl(context: BackendContext) -> TransferBackend:
    """The factory: NIXL is imported from here only."""
    from pd_transfer_nixl.backend import NixlBackend

    configure(context)
    return NixlBackend(context, load(context.device))


@hookimpl
def pd_register_transfer_backends(register: Callable[..., None]) -> None:
    register(
        BackendInfo(
            name="nixl",
            factory=make_nixl,
            summary="NIXL over UCX: RDMA, NVLink, shared memory, TCP",
            accepts=frozenset({"ib_device", "insecure_control_plane"}),
            environment={
                "UCX_TLS": "transports that UCX may use; all by default",
                "UCX_NET_DEVICES": "network devices that UCX may use; by default that of --control-host or --ib-device",
                "UCX_MODULES": "modules that UCX may load; without --ib-device ^efa, all but that",
                "NIXL_UCX_SGL_ENABLE": "1 (default with a GPU): one call of UCX for many descriptors",
                "NIXL_LOG_LEVEL": "what NIXL logs to stderr; WARN by default",
            },
            unavailable=missing,
            refuses=lambda setting, value: missing_rdma_devices(value),
            one_thread=True,
        )
    )
