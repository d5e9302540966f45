"""Stands where the vendor's module would be imported, in processes that have this folder on their path."""

from tests.plugins.fake_memfabric import TransferEngine, create_config_store

__all__ = ["TransferEngine", "create_config_store"]
