"""The public interfaces: all that a plugin implements."""

from pd.abc.connected import ConnectedBackend, Receiver
from pd.abc.doors import Call, Caller, Door
from pd.abc.hosts import interface_of, machine_id, missing_rdma_devices, reachable_address
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
    host_region,
    within,
)

__all__ = [
    "BackendContext",
    "BackendDefaults",
    "BackendInfo",
    "Call",
    "Caller",
    "ConnectedBackend",
    "DeviceMemory",
    "Door",
    "Natural",
    "Peer",
    "PolicyContext",
    "Receiver",
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
    "host_region",
    "interface_of",
    "machine_id",
    "missing_rdma_devices",
    "reachable_address",
    "within",
]
