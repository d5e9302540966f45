"""An end of a transfer whose device memory nobody can map (see `tests.shared_device`)."""

from __future__ import annotations

from pd.abc import DeviceMemory
from pd.testing.transfer_peer import main
from tests.shared_device import DeviceSide, SharedDevice


class UnmappableSide(DeviceSide):
    def device_memory(self) -> DeviceMemory:
        device = SharedDevice()
        device.mappable = False
        return device


if __name__ == "__main__":
    main(UnmappableSide)
