"""The public interfaces: all that a plugin implements."""

from pd.abc.doors import Call, Caller, Door, reachable_address
from pd.abc.policy import PolicyContext, RouteRequest, RoutingPolicy, WorkerView
from pd.abc.transfer import (
    BackendContext,
    BackendDefaults,
    BackendInfo,
    DeviceMemory,
    Natural,
    Peer,
    Region,
    Spans,
    Ticket,
    TransferBackend,
    TransferCapabilities,
    addresses,
    decode,
    missing_rdma_devices,
)

__all__ = [
    "BackendContext",
    "BackendDefaults",
    "BackendInfo",
    "Call",
    "Caller",
    "DeviceMemory",
    "Door",
    "Natural",
    "Peer",
    "PolicyContext",
    "Region",
    "RouteRequest",
    "RoutingPolicy",
    "Spans",
    "Ticket",
    "TransferBackend",
    "TransferCapabilities",
    "WorkerView",
    "addresses",
    "decode",
    "missing_rdma_devices",
    "reachable_address",
]
