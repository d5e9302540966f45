"""A radix tree over strings that forgets what was used longest ago.

Edges are string slices, compared as a whole first (memory speed), and by bisection only where they differ. Every match
and insertion moves the nodes of its path to the young end of one list, children before parents; so a parent is always
younger than its children, the old end of the list is always a leaf, and forgetting is one pop.
"""

from __future__ import annotations

from collections import OrderedDict

#: What a node is taken to cost besides its characters: object, dictionaries, list entry.
NODE_COST = 512


class _Node:
    __slots__ = ("children", "edge", "parent")

    def __init__(self, edge: str, parent: _Node | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[str, _Node] | None = None


class PrefixTree:
    """Approximates one worker's prefix cache. `size` is in characters plus NODE_COST per node; at most `max_size`."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.size = 0
        self._root = _Node("", None)
        self._ages: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        """Nodes."""
        return len(self._ages)

    def match(self, text: str) -> int:
        """Characters of the longest known prefix of `text`. Does not count as use."""
        node, position = self._root, 0
        while node.children is not None and position < len(text):
            child = node.children.get(text[position])
            if child is None:
                break
            if not text.startswith(child.edge, position):
                return position + _common(text, position, child.edge)
            position += len(child.edge)
            node = child
        return position

    def insert(self, text: str) -> None:
        """Makes `text` known and the youngest; forgets the oldest until the tree fits again."""
        node, position = self._root, 0
        while position < len(text):
            child = None if node.children is None else node.children.get(text[position])
            if child is None:
                node = self._add(node, text[position:])
                break
            if not text.startswith(child.edge, position):
                shared = _common(text, position, child.edge)
                child = self._split(child, shared)
            position += len(child.edge)
            node = child
        self._touch(node)
        self.trim(self.max_size)

    def trim(self, size: int) -> None:
        """Forgets the oldest until at most `size` is left."""
        while self.size > size and self._ages:
            node, _ = self._ages.popitem(last=False)
            parent = node.parent
            assert parent is not None and parent.children is not None and not node.children
            del parent.children[node.edge[0]]
            if not parent.children:
                parent.children = None
            self.size -= len(node.edge) + NODE_COST

    def _add(self, parent: _Node, edge: str) -> _Node:
        node = _Node(edge, parent)
        if parent.children is None:
            parent.children = {}
        parent.children[edge[0]] = node
        self._ages[node] = None
        self.size += len(edge) + NODE_COST
        return node

    def _split(self, node: _Node, length: int) -> _Node:
        """Cuts a node's edge in two; the new upper part is returned. `node` keeps its age and its children."""
        parent = node.parent
        assert parent is not None and parent.children is not None
        upper = _Node(node.edge[:length], parent)
        parent.children[upper.edge[0]] = upper
        node.edge, node.parent = node.edge[length:], upper
        upper.children = {node.edge[0]: node}
        self._ages[upper] = None
        self.size += NODE_COST
        return upper

    def _touch(self, node: _Node | None) -> None:
        while node is not None and node.parent is not None:
            self._ages.move_to_end(node)
            node = node.parent


def _common(text: str, position: int, edge: str) -> int:
    """Length of the common prefix of `text[position:]` and `edge`, which are known to share the first character."""
    low, high = 1, min(len(edge), len(text) - position)
    while low < high:
        middle = (low + high + 1) // 2
        if text.startswith(edge[low:middle], position + low):
            low = middle
        else:
            high = middle - 1
    return low
