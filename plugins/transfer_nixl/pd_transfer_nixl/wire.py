"""What two backends tell each other: descriptors, the greeting of a sender, and where each process is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from pd.abc import Region
from pd.errors import TransferError

CHECKSUM = 8


class Memory(msgspec.Struct, frozen=True, array_like=True):
    """A registered region. `kind` and `ordinal` are NIXL's: DRAM or VRAM, and which device."""

    address: int
    nbytes: int
    kind: str
    ordinal: int
    block_bytes: int

    @classmethod
    def of(cls, region: Region) -> Memory:
        device, _, ordinal = region.device.partition(":")
        kind = "DRAM" if device == "cpu" else "VRAM"
        return cls(region.address, region.nbytes, kind, int(ordinal or 0), region.block_bytes)


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A process. `machine` and `namespace` say whose process numbers they are; `started` tells it from a later one."""

    machine: str
    namespace: str
    pid: int
    started: int

    @classmethod
    def here(cls) -> Place:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started, _ = process_stat(os.getpid())
        return cls(machine, os.readlink("/proc/self/ns/pid"), os.getpid(), started)

    def knows_ended(self, other: Place) -> bool:
        """Whether a process that can be seen from here has certainly ended."""
        if (self.machine, self.namespace) != (other.machine, other.namespace):
            return False
        started, over = process_stat(other.pid)
        return over or started != other.started


class Descriptor(msgspec.Struct, frozen=True, array_like=True, tag="nixl/1"):
    """`door` is the metadata of the agent that answers greetings; it has no memory."""

    identity: str
    door: bytes
    memory: list[Memory]
    place: Place


class Greeting(msgspec.Struct, frozen=True, array_like=True, tag="greeting/1"):
    """Sender to door: I am `identity` and write as `agent`. `copies`: perhaps without the receiver's help."""

    identity: str
    agent: str
    metadata: bytes
    place: Place
    copies: bool


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome/1"):
    """The answer: the agent, made for this sender alone, to which it writes."""

    metadata: bytes


T = TypeVar("T", Descriptor, Greeting, Welcome)


def seal(message: msgspec.Struct) -> bytes:
    """Encoded, with a checksum before it: after a truncated piece of metadata NIXL rejects the good one as well."""
    data = msgspec.msgpack.encode(message)
    return hashlib.blake2b(data, digest_size=CHECKSUM).digest() + data


def unseal(data: bytes, kind: type[T]) -> T:
    """Raises TransferError."""
    checksum, payload = data[:CHECKSUM], data[CHECKSUM:]
    if hashlib.blake2b(payload, digest_size=CHECKSUM).digest() != checksum:
        raise TransferError("not of nixl, or damaged")
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except msgspec.MsgspecError as error:
        raise TransferError(f"not of nixl: {error}") from error


def process_stat(pid: int) -> tuple[int, bool]:
    """(start time in clock ticks, whether it has ended, if perhaps not yet reaped)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, True
    return int(fields[19]), fields[0] in "ZX" and int(fields[17]) <= 1
