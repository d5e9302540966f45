"""Who owns each KV block. Pure bookkeeping: ids, states, reference counts, generations, digests.

Every block is in exactly one state, and the five counts always add up to the pool's size (`audit`):

    free ──allocate──► owned ◄──retain/release──► cached ──evict──► free
    free ──grant─────► incoming ──adopt──► owned          (it landed and was verified)
                       incoming ──quiet──► free           (nothing was, or can be, written)
                       incoming ──quarantine──► quarantined ──quiet──► free

Owned means held by a request, a step or a push; shared blocks count once. A block that is still in the prefix tree when
its last holder lets go becomes cached instead of free. Scratch block 0 is outside of all counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

FREE, OWNED, CACHED, INCOMING, QUARANTINED = range(5)
STATES = ("free", "owned", "cached", "incoming", "quarantined")

_IS_OWNED = bytes(state == OWNED for state in range(256))


class _FreeRuns:
    """Free blocks as maximal runs, so that allocations are contiguous where they can be.

    A run is found by its start or its end in O(1) (boundary tags); runs are binned by the power of two of their length.
    """

    def __init__(self) -> None:
        self._length: dict[int, int] = {}  # start -> length
        self._start: dict[int, int] = {}  # last block -> start
        self._bins: dict[int, dict[int, None]] = {}  # bit length -> starts, insertion ordered

    def _add(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length - 1] = start
        self._bins.setdefault(length.bit_length(), {})[start] = None

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start[start + length - 1]
        bin_ = self._bins[length.bit_length()]
        del bin_[start]
        if not bin_:
            del self._bins[length.bit_length()]
        return length

    def put(self, block: int, length: int = 1) -> None:
        before = self._start.get(block - 1)
        if before is not None:
            length += self._remove(before)
            block = before
        if block + length in self._length:
            length += self._remove(block + length)
        self._add(block, length)

    def take(self, count: int) -> list[int]:
        """`count` blocks, which must be free: one run if any is long enough, else the longest runs first."""
        taken: list[int] = []
        while count:
            start = self._find(count)
            length = self._remove(start)
            used = min(length, count)
            taken.extend(range(start, start + used))
            if length > used:
                self._add(start + used, length - used)
            count -= used
        return taken

    def _find(self, count: int) -> int:
        # Every run in a bin above the count's own is long enough; in its own bin one may be.
        own = count.bit_length()
        for start in self._bins.get(own, ()):
            if self._length[start] >= count:
                return start
            break  # a scan of the bin would be unbounded
        fitting = [b for b in self._bins if b > own]
        return next(iter(self._bins[min(fitting) if fitting else max(self._bins)]))


class BlockPool:
    """All blocks of one lane and group. `evict(n)` asks the prefix tree to give up at least `n` cached blocks."""

    def __init__(self, num_blocks: int, evict: Callable[[int], object] | None = None) -> None:
        """`num_blocks` includes scratch block 0, which is never handed out."""
        self.total = num_blocks - 1
        self.counts = [0] * len(STATES)
        self.counts[FREE] = self.total
        self.generation = [0] * num_blocks
        self.digest: list[int | None] = [None] * num_blocks
        self._state = bytearray(num_blocks)
        self._refs = [0] * num_blocks
        self._runs = _FreeRuns()
        self._in_tree = bytearray(num_blocks)
        self._held: list[tuple[int, list[int]]] = []  # (last step that may touch them, blocks), steps ascending
        self.evict = evict or (lambda n: None)
        self.on_cached: Callable[[int], None] = lambda block: None
        self.on_used: Callable[[int], None] = lambda block: None
        if self.total:
            self._runs.put(1, self.total)

    # --- queries ---

    @property
    def available(self) -> int:
        """Blocks that `allocate` or `grant` can hand out now: free or evictable."""
        return self.counts[FREE] + self.counts[CACHED]

    @property
    def returning(self) -> int:
        """Blocks that a running step still holds and that will be available when it is done (upper bound)."""
        return sum(len(blocks) for _, blocks in self._held)

    def state_of(self, block: int) -> str:
        return STATES[self._state[block]]

    def refs(self, block: int) -> int:
        return self._refs[block]

    def audit(self) -> dict[str, int]:
        """Counts by state, recounted from the blocks. Raises AssertionError when the books do not balance.

        A running instance audits itself on its event loop: no Python code runs per block unless one is wrong.
        """
        states = self._state[1:]
        recount = [states.count(state) for state in range(len(STATES))]
        assert recount == self.counts, f"counts {self.counts} != recount {recount}"
        assert sum(recount) == self.total, f"{sum(recount)} blocks of {self.total} have a state"
        refs, owned = self._refs[1:], states.translate(_IS_OWNED)
        # As many blocks have references as are owned, and all that are owned do: then no other block has any.
        if self.total - refs.count(0) != recount[OWNED] or not all(compress(refs, owned)):
            block = next(b for b in range(1, self.total + 1) if (self._refs[b] > 0) != owned[b - 1])
            raise AssertionError(f"block {block}: {self._refs[block]} refs, {self.state_of(block)}")
        return dict(zip(STATES, recount, strict=True))

    # --- owned ---

    def _set(self, block: int, state: int) -> None:
        counts = self.counts
        counts[self._state[block]] -= 1
        counts[state] += 1
        self._state[block] = state

    def _take(self, count: int, state: int) -> list[int] | None:
        if count > self.counts[FREE]:
            if count > self.available:
                return None
            self.evict(count - self.counts[FREE])
            if count > self.counts[FREE]:
                return None
        blocks = self._runs.take(count)
        generation, digest, states = self.generation, self.digest, self._state
        for block in blocks:
            generation[block] += 1  # a new owner: messages that name the old one are refused
            digest[block] = None
            states[block] = state
        self.counts[FREE] -= count
        self.counts[state] += count
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks owned by the caller (one reference each), or None and nothing changed but evictions."""
        blocks = self._take(count, OWNED)
        if blocks is not None:
            for block in blocks:
                self._refs[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder of owned or cached blocks."""
        for block in blocks:
            if self._refs[block] == 0:
                assert self._state[block] == CACHED, f"retain of block {block}: {self.state_of(block)}"
                self.on_used(block)
                self._set(block, OWNED)
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less. Last block first, so that the prefix tree's oldest entries are leaves."""
        refs, freed = self._refs, []
        for block in reversed(list(blocks)):
            left = refs[block] - 1
            assert left >= 0, f"release of block {block}: {self.state_of(block)}"
            refs[block] = left
            if left == 0:
                if self._in_tree[block]:
                    self._set(block, CACHED)
                    self.on_cached(block)
                else:
                    freed.append(block)
        self._free(freed)

    def _free(self, owned: Sequence[int]) -> None:
        """Blocks that nobody holds; those next to each other, in falling order, go back as one run."""
        states, at = self._state, 0
        self.counts[OWNED] -= len(owned)
        self.counts[FREE] += len(owned)
        while at < len(owned):
            first = at
            while at < len(owned) and owned[at] == owned[first] - (at - first):
                states[owned[at]] = FREE
                at += 1
            self._runs.put(owned[at - 1], at - first)

    def release_after(self, step: int, blocks: Sequence[int]) -> None:
        """Release once every step up to `step` is done: until then a running step may still touch them."""
        if blocks:
            assert not self._held or self._held[-1][0] <= step
            self._held.append((step, list(blocks)))

    def step_done(self, step: int) -> None:
        while self._held and self._held[0][0] <= step:
            self.release(self._held.pop(0)[1])

    # --- the prefix tree's side ---

    def enter_tree(self, block: int) -> None:
        assert self._state[block] == OWNED and not self._in_tree[block]
        self._in_tree[block] = 1

    def leave_tree(self, block: int) -> None:
        """The tree forgets the block; a cached one becomes free."""
        assert self._in_tree[block]
        self._in_tree[block] = 0
        if self._state[block] == CACHED:
            self._set(block, FREE)
            self._runs.put(block)

    # --- incoming ---

    def grant(self, count: int) -> list[int] | None:
        """`count` blocks that a peer may write from now on, or None."""
        return self._take(count, INCOMING)

    def adopt(self, blocks: Iterable[int]) -> None:
        """Landed and verified: the request owns them (one reference)."""
        for block in blocks:
            assert self._state[block] == INCOMING, f"adopt of block {block}: {self.state_of(block)}"
            self._set(block, OWNED)
            self._refs[block] = 1

    def quarantine(self, blocks: Iterable[int]) -> None:
        """Their sender is lost and a write may still land: nobody gets them until `quiet`."""
        for block in blocks:
            if self._state[block] != QUARANTINED:
                assert self._state[block] == INCOMING, f"quarantine of block {block}: {self.state_of(block)}"
                self._set(block, QUARANTINED)

    def quiet(self, blocks: Iterable[int]) -> None:
        """Nothing can land in these incoming or quarantined blocks any more: they are free."""
        for block in blocks:
            assert self._state[block] in (INCOMING, QUARANTINED), f"quiet of block {block}: {self.state_of(block)}"
            self._set(block, FREE)
            self._runs.put(block)
