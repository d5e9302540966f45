"""Requests whose grammar the runner has not compiled yet wait here, not in the queue.

Compiling takes the runner up to seconds, beside the steps. A request that came in before it is done would hold up every
other one at its first sample.
"""

from __future__ import annotations

from collections import OrderedDict

from pd.messages import GrammarCompile
from pd.scheduler.actions import Action, CompileGrammar
from pd.scheduler.request import Request

#: Grammars that the runner is taken to have at hand. It keeps more, so that it does.
REMEMBERED = 32


class GrammarGate:
    """Asks for each grammar once. `held` counts the requests that wait for one."""

    def __init__(self, out: list[Action]) -> None:
        self._out = out
        self._ready: OrderedDict[str, None] = OrderedDict()  # the one used last comes last
        self._waiting: dict[str, dict[int, Request]] = {}  # by grammar and by key, in order
        self._asked: dict[int, str] = {}
        self._last = 0
        self.held = 0

    def passes(self, request: Request) -> bool:
        """Whether the request may be queued now; `compiled` returns it otherwise."""
        grammar = request.sampling.grammar
        if not grammar:
            return True
        if grammar in self._ready:
            self._ready.move_to_end(grammar)
            return True
        self.held += 1
        waiting = self._waiting.get(grammar)
        if waiting is not None:
            waiting[request.key] = request
        else:
            self._waiting[grammar] = {request.key: request}
            self._last += 1
            self._asked[self._last] = grammar
            self._out.append(CompileGrammar(GrammarCompile(self._last, grammar)))
        return False

    def leave(self, request: Request) -> None:
        """The request ends, or is stopped; does nothing when it does not wait here."""
        grammar = request.sampling.grammar
        if grammar and self._waiting.get(grammar, {}).pop(request.key, None) is not None:
            self.held -= 1

    def compiled(self, number: int, problem: str) -> list[Request]:
        """The requests that wait for it, in order."""
        grammar = self._asked.pop(number)
        requests = list(self._waiting.pop(grammar).values())
        self.held -= len(requests)
        if not problem:
            self._ready[grammar] = None
            if len(self._ready) > REMEMBERED:
                self._ready.popitem(last=False)
        return requests
