"""Prompts with the same beginning go to the same worker."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from pd.abc import PolicyContext, RouteRequest, WorkerView

#: Characters, or token ids, that count as the beginning of a prompt.
BEGINNING = 256


class Sticky:
    """Rendezvous hashing: of all workers the one whose name, hashed with the prompt's beginning, gives the most.

    A worker that goes takes only its own prompts with it (D. Thaler, C. Ravishankar, "Using name-based mappings to
    increase hit rates", 1998).
    """

    wants_prompt = True

    def __init__(self, context: PolicyContext) -> None:
        pass

    def choose(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        key = blake2b(_beginning(request)).digest()
        return max(workers, key=lambda worker: blake2b(worker.url.encode(), key=key, digest_size=8).digest())

    def finished(self, request: RouteRequest, worker: WorkerView) -> None:
        pass


def _beginning(request: RouteRequest) -> bytes:
    if request.text is not None:
        return request.text[:BEGINNING].encode("utf-8", "surrogatepass")
    return array("q", (request.token_ids or ())[:BEGINNING]).tobytes()
