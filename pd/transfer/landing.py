"""The receiving side of the core: grants, fences, digests.

A granted block belongs to the hand-off from `grant` until its `TransferVerified`, `TransferRevoked(quiet)` or the
sender's `TransferExpelled(quiet)` was reported; the scheduler keeps it out of the pool until then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pd.abc import DeviceMemory, Region, Spans, TransferBackend
from pd.errors import ProtocolError, TransferError
from pd.messages import (
    TransferExpel,
    TransferExpelled,
    TransferGrant,
    TransferRevoke,
    TransferRevoked,
    TransferVerified,
    TransferVerify,
)
from pd.transfer.digest import digest_block, valid_runs
from pd.transfer.spans import Pool, block_ids, block_spans, check_blocks
from pd.transfer.staging import Staging

U64 = npt.NDArray[np.uint64]


@dataclass
class Landing:
    """One hand-off, however many ranks send: who was granted what, and the digests that came with it."""

    granted: dict[str, list[Spans]] = field(default_factory=dict)
    landed: set[str] = field(default_factory=set)  # senders that said so: the verify that asks about them implies it
    pieces: list[U64] = field(default_factory=list)  # as take_digests returns them
    error: str = ""


@dataclass(frozen=True)
class Check:
    """What is left of a verify once the backend was asked: digests to compute and compare."""

    command: TransferVerify
    pool: Pool
    region: Region
    ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    heads: tuple[int, int]
    pieces: U64
    spans: Spans


class Receiving:
    """Commands that concern what lands here.

    `grant`, `revoke`, `expel` and `begin_verify` call the backend and are made by one thread; `check` only computes
    and may be made by another.
    """

    def __init__(
        self, backend: TransferBackend, pools: list[Pool], staging: Staging, memory: DeviceMemory, rank: int = 0
    ) -> None:
        self._backend, self._pools, self._staging, self._memory, self._rank = backend, pools, staging, memory, rank
        self._regions = staging.regions()
        self._landings: dict[int, Landing] = {}

    @property
    def busy(self) -> bool:
        """Whether somebody may be writing here."""
        return bool(self._landings)

    def grant(self, command: TransferGrant) -> None:
        """Nothing answers a grant; a wrong one makes the hand-off's verify fail."""
        landing = self._landings.setdefault(command.tag, Landing())
        try:
            pool = self._pool(command.group)
            ids = block_ids(command.blocks_i32, "blocks_i32")
            check_blocks(ids, pool.num_blocks, "blocks_i32")
            spans = block_spans(pool, command.group, ids)
            self._staging.hold(spans)
            landing.granted.setdefault(command.sender, []).append(spans)
            if self._backend.capabilities.revocable:
                self._backend.grant(command.tag, spans, command.sender)
        except (ProtocolError, TransferError) as error:
            landing.error = f"grant: {error}"

    def revoke(self, command: TransferRevoke) -> TransferRevoked:
        """A backend that cannot revoke single hand-offs answers quiet only for a sender whose landing was verified."""
        landing = self._landings.get(command.tag)
        quiet = landing is not None and command.sender in landing.landed
        if self._backend.capabilities.revocable:
            quiet = self._backend.revoke(command.tag, command.sender)
            if quiet and self._backend.capabilities.returns_digests:
                self._backend.take_digests(command.tag, command.sender)
        if quiet or command.over:
            self._forget(command.tag, command.sender)
        return TransferRevoked(command.tag, quiet, command.sender, self._rank)

    def expel(self, command: TransferExpel) -> TransferExpelled:
        quiet = self._backend.expel(command.sender)
        if quiet:
            for tag in [tag for tag, landing in self._landings.items() if command.sender in landing.granted]:
                self._forget(tag, command.sender)
        return TransferExpelled(command.sender, quiet, self._rank)

    def begin_verify(self, command: TransferVerify) -> Check | TransferVerified:
        """End the grant, fence, collect digests. Raises ProtocolError, TransferError."""
        landing = self._landings.setdefault(command.tag, Landing())
        landing.granted.setdefault(command.sender, [])
        capabilities = self._backend.capabilities
        if capabilities.revocable and not self._backend.revoke(command.tag, command.sender):
            raise TransferError("the grant could not be ended in time")
        self._backend.fence(command.sender)
        landing.landed.add(command.sender)
        if capabilities.returns_digests:
            landing.pieces.append(self._backend.take_digests(command.tag, command.sender))
        if landing.error:
            raise TransferError(landing.error)
        pool = self._pool(command.group)
        ids = block_ids(command.blocks_i32, "blocks_i32")
        tokens = block_ids(command.tokens_i32, "tokens_i32")
        check_blocks(ids, pool.num_blocks, "blocks_i32")
        if not len(ids):  # one of several senders: the last one's verify compares the sum
            return TransferVerified(command.tag, b"", 0, "", command.sender, b"", self._rank)
        if len(tokens) != len(ids) or len(command.digests_u64) not in (0, 8 * len(ids)):
            raise ProtocolError("tokens_i32", f"{len(tokens)} and {len(command.digests_u64)} bytes of digests")
        if tokens.min() < 1 or tokens.max() > pool.shape.tokens:
            raise ProtocolError("tokens_i32", f"outside 1..{pool.shape.tokens}")
        spans = block_spans(pool, command.group, ids)
        heads = pool.local_heads(command.kv_heads)
        region = self._regions[command.group]
        pieces = np.concatenate([np.zeros((0, 4), np.uint64), *landing.pieces])
        return Check(command, pool, region, ids, tokens, heads, pieces, spans)

    def check(self, check: Check) -> TransferVerified:
        """Compare digests; what was staged goes to the device if all is well."""
        command = check.command
        digests = self._digests(check)
        bad = np.zeros(0, np.int64)
        if command.digests_u64:
            bad = check.ids[digests != np.frombuffer(command.digests_u64, dtype="<u8")]
        if not len(bad):
            self._staging.store(check.spans)
        nbytes = len(check.ids) * (check.heads[1] - check.heads[0]) * check.pool.shape.head_bytes
        return TransferVerified(
            command.tag,
            bad.astype("<i4").tobytes(),
            nbytes,
            "",
            command.sender,
            digests.astype("<u8").tobytes(),
            self._rank,
        )

    def failed(self, command: TransferVerify, reason: str) -> TransferVerified:
        return TransferVerified(command.tag, b"", 0, reason, command.sender, b"", self._rank)

    def _pool(self, group: int) -> Pool:
        if not 0 <= group < len(self._pools):
            raise ProtocolError("group", f"{group} of {len(self._pools)}")
        return self._pools[group]

    def _forget(self, tag: int, sender: str) -> None:
        """The sender is quiet for this hand-off."""
        landing = self._landings.get(tag)
        if landing is None:
            return
        for spans in landing.granted.pop(sender, []):
            self._staging.release(spans)
        if not landing.granted:
            del self._landings[tag]

    def _digests(self, check: Check) -> U64:
        """uint64[blocks]: summed from what the backend returned where that is the whole of a block's slice."""
        shape, (first, last) = check.pool.shape, check.heads
        start, length = first * shape.head_bytes, (last - first) * shape.head_bytes
        pieces = check.pieces[check.pieces[:, 0] == check.region.index]
        blocks, inside = np.divmod(pieces[:, 1].astype(np.int64), shape.nbytes)
        mine = (inside >= start) & (inside < start + length)
        # Per block of the pool: bytes that the backend digested, and the sum. What landed twice counts twice.
        nbytes, sums = np.zeros(check.pool.num_blocks, np.uint64), np.zeros(check.pool.num_blocks, np.uint64)
        np.add.at(nbytes, blocks[mine], pieces[mine, 2])
        np.add.at(sums, blocks[mine], pieces[mine, 3])
        out = sums[check.ids]
        left = np.flatnonzero((check.tokens != shape.tokens) | (nbytes[check.ids] != length)).tolist()
        if left:
            self._compute(check, left, out)
        return out

    def _compute(self, check: Check, left: list[int], out: U64) -> None:
        """Digest the blocks at positions `left` here: in host memory with numpy, on a device by its own means."""
        shape, geometry = check.pool.shape, check.pool.geometry
        if check.region.buffer is not None:
            raw = np.frombuffer(check.region.buffer, dtype=np.uint8)
            for i in left:
                at = int(check.ids[i]) * shape.nbytes
                out[i] = digest_block(raw[at : at + shape.nbytes], int(check.tokens[i]), geometry, check.heads)
            return
        runs, counts = [], []
        for i in left:
            run = valid_runs(geometry, int(check.tokens[i]), check.heads)
            run[:, 0] += np.uint64(int(check.ids[i]) * shape.nbytes)
            runs.append(run)
            counts.append(len(run))
        table = np.concatenate(runs)
        spans = np.zeros((len(table), 3), dtype=np.uint64)
        spans[:, 0], spans[:, 1:] = check.region.index, table[:, :2]
        parts = np.asarray(self._memory.digest(self._regions, spans, table[:, 2]), dtype=np.uint64)
        starts = np.cumsum([0, *counts[:-1]])
        out[left] = np.add.reduceat(parts, starts)
