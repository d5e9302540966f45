"""Where the prompt's prefix was last seen, unless that worker has too much to do already."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence

from pd.abc import PolicyContext, RouteRequest, WorkerView
from pd.errors import ConfigError
from pd_policies.load import least
from pd_policies.tree import PrefixTree

#: Marks prompts of token ids in a tree: a character that text does not begin with, so that ids never match text.
_IDS = "\udfff"

_UTF32 = f"utf-32-{sys.byteorder[0]}e"


class CacheAware:
    """SGLang's cache-aware routing, approximating each worker's prefix cache by a tree of what was sent there.

    If the busiest worker has more than `balance_abs_threshold` requests more than the idlest, and more than
    `balance_rel_threshold` times as many, the idlest gets the request. Otherwise the worker with the longest match, if
    it covers more than `cache_threshold` of the prompt; otherwise the one with the smallest tree. Ties go to the less
    loaded worker. A worker's tree never keeps more than `max_tree_size` (characters or token ids, plus a cost per
    node); every `eviction_interval` seconds the trees of workers that were not seen since are dropped.
    """

    wants_prompt = True

    def __init__(self, context: PolicyContext) -> None:
        self._random, self._now = context.random, context.now
        self.balance_abs_threshold = _number(context.options, "balance_abs_threshold", 64)
        self.balance_rel_threshold = _number(context.options, "balance_rel_threshold", 1.5)
        self.cache_threshold = _number(context.options, "cache_threshold", 0.3)
        self.eviction_interval = _number(context.options, "eviction_interval", 60)
        self.max_tree_size = int(_number(context.options, "max_tree_size", 1 << 26))
        self.trees: dict[str, PrefixTree] = {}
        self._seen: set[str] = set()
        self._evicted = self._now()

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        self._evict(workers)
        prompt = _prompt(request)
        worker = self._choose(prompt, workers)
        if prompt:
            self._tree(worker).insert(prompt)
        return worker

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        pass

    def _choose(self, prompt: str, workers: Sequence[WorkerView]) -> WorkerView:
        if len(workers) == 1:
            return workers[0]
        counts = [worker.in_flight for worker in workers]
        low, high = min(counts), max(counts)
        if high - low > self.balance_abs_threshold and high > self.balance_rel_threshold * low:
            return least([worker for worker in workers if worker.in_flight == low], self._random)
        if not prompt:
            return least(workers, self._random)
        matches = [self._tree(worker).match(prompt) for worker in workers]
        longest = max(matches)
        mark = prompt.startswith(_IDS)
        if longest - mark > self.cache_threshold * (len(prompt) - mark):
            best = [worker for worker, match in zip(workers, matches, strict=True) if match == longest]
            return least(best, self._random)
        sizes = [self._tree(worker).size for worker in workers]
        smallest = min(sizes)
        best = [worker for worker, size in zip(workers, sizes, strict=True) if size == smallest]
        return least(best, self._random)

    def _tree(self, worker: WorkerView) -> PrefixTree:
        tree = self.trees.get(worker.url)
        if tree is None:
            tree = self.trees[worker.url] = PrefixTree(self.max_tree_size)
        return tree

    def _evict(self, workers: Sequence[WorkerView]) -> None:
        self._seen.update(worker.url for worker in workers)
        now = self._now()
        if now - self._evicted < self.eviction_interval:
            return
        self._evicted = now
        for url in self.trees.keys() - self._seen:
            del self.trees[url]
        self._seen = {worker.url for worker in workers}


def _prompt(request: RouteRequest) -> str:
    """The prompt as a string: text as it is, token ids as one character each."""
    if request.text is not None:
        return request.text
    if not request.token_ids:
        return ""
    try:
        return _IDS + array("I", request.token_ids).tobytes().decode(_UTF32, "surrogatepass")
    except (UnicodeDecodeError, OverflowError):  # no vocabulary has such ids
        return ""


def _number(options: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(options.get(name, default))
    except ValueError:
        value = -1.0
    if value < 0:
        raise ConfigError(name, f"{options[name]!r} is not a number of at least 0", "option of the policy cache_aware")
    return value
