"""What pd loads: registers the policies under their names."""

from __future__ import annotations

from collections.abc import Callable

from pd import hookimpl
from pd_policies.cache_aware import CacheAware
from pd_policies.load import LeastLoad, PowerOfTwo
from pd_policies.round_robin import RoundRobin


@hookimpl
def pd_register_routing_policies(register: Callable[..., None]) -> None:
    register("cache_aware", CacheAware, summary="where the prompt's prefix was last seen", prefer="prefill")
    register("power_of_two", PowerOfTwo, summary="the less loaded of two random workers", prefer="decode")
    register("least_load", LeastLoad, summary="the least loaded worker")
    register("round_robin", RoundRobin, summary="one after the other")
