"""Routing policies for `pd route`. Each is a plain class; `pd_policies.plugin` registers them."""

from pd_policies.cache_aware import CacheAware
from pd_policies.load import LeastLoad, PowerOfTwo
from pd_policies.round_robin import RoundRobin
from pd_policies.tree import PrefixTree

__all__ = ["CacheAware", "LeastLoad", "PowerOfTwo", "PrefixTree", "RoundRobin"]
