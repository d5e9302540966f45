"""Prefix cache: a radix tree over whole blocks (as SGLang's RadixAttention, with one block per edge), LRU by leaf.

A node is one full block of tokens under a parent; its key is the block's tokens as bytes. Whoever uses a path holds a
reference on each of its blocks, so a referenced block's ancestors are referenced too, and eviction in order of release
(children released before parents) always meets leaves first.
"""

from __future__ import annotations

from collections.abc import Sequence

from pd.scheduler.blocks import BlockPool


class _Node:
    __slots__ = ("block", "children", "key", "parent")

    def __init__(self, parent: _Node | None, key: bytes, block: int) -> None:
        self.parent, self.key, self.block = parent, key, block
        self.children: dict[bytes, _Node] = {}


class PrefixCache:
    """Roots are kept per salt (adapter, media, tenant) and weights version."""

    def __init__(self, pool: BlockPool, page_size: int, *, enabled: bool = True) -> None:
        self.pool, self.page_size, self.enabled = pool, page_size, enabled
        self._roots: dict[str, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # block -> node
        self._lru: dict[int, None] = {}  # cached blocks, least recently released first
        pool.evict = self.evict
        pool.on_cached = lambda block: self._lru.__setitem__(block, None)
        pool.on_used = lambda block: self._lru.pop(block, None)

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: bytes | bytearray | memoryview, limit: int, salt: str = "") -> list[int]:
        """Blocks of the longest cached prefix of at most `limit` tokens (int32 bytes). Takes no reference."""
        node = self._roots.get(salt)
        if node is None or not self.enabled:
            return []
        width = 4 * self.page_size
        view, blocks = memoryview(tokens), []
        for at in range(0, (limit // self.page_size) * width, width):
            node = node.children.get(bytes(view[at : at + width]))
            if node is None:
                break
            blocks.append(node.block)
        return blocks

    def insert(
        self, tokens: bytes | bytearray | memoryview, blocks: Sequence[int], start: int, salt: str = ""
    ) -> dict[int, int]:
        """Enter the full blocks `start`.. of a path that its caller holds; `blocks[i]` holds tokens of page i.

        Where an equal block is in the tree already the first insertion wins: the caller keeps its own block, and a
        reference on the tree's is taken on its behalf (so that the path above its later blocks stays referenced).
        Returns those blocks by page; the caller releases each together with its own block of that page, deepest page
        first, so that a parent never becomes evictable before its child.
        """
        if not self.enabled:
            return {}
        node = self._roots.setdefault(salt, _Node(None, b"", 0))
        width = 4 * self.page_size
        view, extra = memoryview(tokens), {}
        full = min(len(blocks), len(view) // width)
        for index in range(full):
            key = bytes(view[index * width : (index + 1) * width])
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(node, key, blocks[index])
                self._nodes[blocks[index]] = child
                self.pool.enter_tree(blocks[index])
            elif child.block != blocks[index] and index >= start:
                self.pool.retain((child.block,))
                extra[index] = child.block
            node = child
        return extra

    def evict(self, count: int) -> int:
        """Give up at least `count` cached blocks, least recently used leaves first. Returns how many were freed."""
        freed = 0
        while freed < count and self._lru:
            block = next(iter(self._lru))
            self._drop(block)
            freed += 1
        return freed

    def flush(self) -> int:
        """Forget every block that nobody holds. Returns how many were freed."""
        return self.evict(len(self._lru))

    def _drop(self, block: int) -> None:
        node = self._nodes.pop(block)
        assert not node.children and node.parent is not None, "an inner node was evicted before its children"
        del node.parent.children[node.key]
        del self._lru[block]
        self.pool.leave_tree(block)
