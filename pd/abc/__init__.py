"""The public interfaces: all that a plugin implements."""

from pd.abc.policy import PolicyContext, RouteRequest, RoutingPolicy, WorkerView
from pd.abc.transfer import (
    BackendContext,
    BackendInfo,
    DeviceMemory,
    Peer,
    Region,
    Spans,
    Ticket,
    TransferBackend,
    TransferCapabilities,
)

__all__ = [
    "BackendContext",
    "BackendInfo",
    "DeviceMemory",
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
]
