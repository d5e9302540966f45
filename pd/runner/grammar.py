"""Constrained sampling: which tokens may come next, given the grammar and what was emitted so far.

A grammar is compiled once, on a thread of its own; every request gets a copy of what came of it. The output is counted
from the original prompt's end, so a request that goes on elsewhere or is replayed goes on at its place in the grammar.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import llguidance.numpy as bitmasks
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from pd.kernels.shaping import WORD_BITS, token_bits
from pd.messages import GrammarCompile, GrammarCompiled
from pd.runner.inputs import Int32, Request
from pd.stacks import call_deep

#: Compiled grammars that are kept, and the characters of all of them. A schema of 150 KB takes some megabytes.
KEPT = 64
KEPT_CHARACTERS = 4 << 20
#: The api allows less.
LONGEST = 1 << 20


class Unusable(ValueError):
    """A grammar cannot be used with this model. The message says why."""


class Constraint:
    """One request's place in its grammar. Once there is a `problem` the request cannot go on."""

    __slots__ = ("_compiled", "_emitted", "_matcher", "problem")

    def __init__(self, compiled: Future[LLMatcher], emitted: list[int]) -> None:
        self._compiled, self._emitted = compiled, emitted
        self._matcher: LLMatcher | None = None
        self.problem = ""

    @property
    def matcher(self) -> LLMatcher:
        """At its place. Waits for the grammar where it is not compiled yet."""
        if self._matcher is None:
            error = self._compiled.exception()
            if error is not None:
                raise Unusable(_reason(error))
            self._matcher = self._compiled.result().deep_copy()
            self._matcher.consume_tokens(self._emitted)
        return self._matcher

    def usable(self) -> bool:
        if not self.problem:
            try:
                self._check(self.matcher)
            except Unusable as error:
                self.problem = str(error)
        return not self.problem

    def _check(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise Unusable(_first_lines(matcher.get_error()))

    def advance(self, token: int) -> None:
        """The request goes on with `token`."""
        if not self.problem:
            self.matcher.consume_token(token)


class Grammars:
    """Compiled grammars of one model. All methods belong to the thread of the steps.

    `compiled_fd` can be read when `take_compiled` has something.
    """

    def __init__(self, path: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.compiled_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._vocab, self._eos = vocab_size, list(eos_token_ids)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pd-grammar")
        # While the weights are read: it holds the interpreter for half a second when the vocabulary is large.
        self._tokenizer = self._thread.submit(_make_tokenizer, Path(path) / "tokenizer.json", vocab_size, self._eos)
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()  # the one used last comes last
        self._characters = 0
        self._done: deque[GrammarCompiled] = deque()
        self._executor: LLExecutor | None = None
        self._masks = np.zeros((0, 0), dtype=np.int32)

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        os.close(self.compiled_fd)

    # --- compiling ---

    def compile(self, order: GrammarCompile) -> None:
        """Answered through `take_compiled`."""

        def done(future: Future[LLMatcher]) -> None:
            if future.cancelled():
                return  # closing: nobody waits for it
            error = future.exception()
            self._done.append(GrammarCompiled(order.number, "" if error is None else _reason(error)))
            os.eventfd_write(self.compiled_fd, 1)

        self._find(order.grammar).add_done_callback(done)

    def take_compiled(self) -> list[GrammarCompiled]:
        try:
            os.eventfd_read(self.compiled_fd)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def constrain(self, request: Request) -> None:
        """Give an admitted request its place in its grammar."""
        emitted = request.tokens.view[request.prompt_len :].tolist()
        request.constraint = Constraint(self._find(request.sampling.grammar), emitted)

    def _find(self, grammar: str) -> Future[LLMatcher]:
        found = self._kept.get(grammar)
        if found is not None:
            self._kept.move_to_end(grammar)
            return found
        found = self._kept[grammar] = self._thread.submit(self._compile, grammar)
        self._characters += len(grammar)
        while len(self._kept) > KEPT or (self._characters > KEPT_CHARACTERS and len(self._kept) > 1):
            self._characters -= len(self._kept.popitem(last=False)[0])
        return found

    def _compile(self, grammar: str) -> LLMatcher:
        """On the thread. The first mask shows what is wrong only in use, and later ones profit from it."""
        if len(grammar) > LONGEST:
            raise Unusable(f"the grammar has {len(grammar)} characters, at most {LONGEST} are allowed")
        tokenizer = self._tokenizer.result()
        matcher = call_deep(lambda: _new_matcher(tokenizer, grammar))
        if matcher.is_error():
            raise Unusable(_first_lines(matcher.get_error()))
        return matcher

    # --- sampling ---

    def allowed(self, requests: Sequence[Request]) -> Mapping[int, Int32]:
        """By index of the constrained requests: the tokens that can be drawn, at least one, `min_tokens` regarded.

        int32[ceil(V / 32)], as `pd.kernels.shaping.token_bits` makes them. A request for which there is no token has a
        `problem` afterwards, and no entry.
        """
        rows = [
            (index, request, request.constraint)
            for index, request in enumerate(requests)
            if request.constraint is not None and request.constraint.usable()
        ]
        if not rows:
            return {}
        masks = self._fill([constraint.matcher for _, _, constraint in rows])
        found = {}
        for bits, (index, request, constraint) in zip(masks, rows, strict=True):
            if constraint.usable():
                # What a grammar wants comes first: where only end tokens are left, the output is complete.
                if request.sampling.ignore_eos:
                    bits = _without(bits, self._eos)
                if request.too_short:
                    bits = _without(bits, request.sampling.stop_token_ids)
                if bits.any():
                    found[index] = bits
                else:
                    constraint.problem = "no token of the model continues the output as its grammar wants"
        return found

    def _fill(self, matchers: list[LLMatcher]) -> Int32:
        """int32[n, ceil(V / 32)]: a bit for each token that may come next. Only the model's tokens have one."""
        width = (self._tokenizer.result().vocab_size + 31) // 32
        if self._masks.shape[0] < len(matchers) or self._masks.shape[1] != width:
            self._masks = np.zeros((2 * len(matchers), width), dtype=np.int32)
        if len(matchers) == 1:
            bitmasks.fill_next_token_bitmask(matchers[0], self._masks, 0)
        else:
            if self._executor is None:
                self._executor = LLExecutor()
            pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
            bitmasks.fill_next_token_bitmask_par(self._executor, pairs, self._masks)
        words = -(-self._vocab // WORD_BITS)
        bits = np.zeros((len(matchers), words), dtype=np.int32)
        bits[:, :width] = self._masks[: len(matchers), :words]
        if self._vocab % WORD_BITS:
            bits[:, -1] &= (1 << self._vocab % WORD_BITS) - 1
        return bits


def _without(bits: Int32, tokens: Sequence[int]) -> Int32:
    """These bits without those of `tokens`, unless nothing would be left."""
    room = WORD_BITS * len(bits)
    fewer: Int32 = bits & ~token_bits([token for token in tokens if 0 <= token < room], room)
    return fewer if fewer.any() else bits


def _make_tokenizer(file: Path, vocab_size: int, eos: list[int]) -> LLTokenizer:
    """Raises Unusable when the model has none that llguidance understands."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Unusable(f"the model has no tokenizer.json: {error.strerror}") from error
    if not eos:
        raise Unusable("the model has no end-of-sequence token")
    try:
        try:
            return LLTokenizer(text, n_vocab=vocab_size, eos_token=eos)
        except ValueError:  # more tokens than the model has, which are cut off later
            return LLTokenizer(text, eos_token=eos)
    except ValueError as error:
        raise Unusable(f"the model's tokenizer is not supported for it: {error}") from error


def _new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"


def _first_lines(error: str) -> str:
    """Without the library's internals."""
    first = error.partition("\n<")[0].strip()
    return "no output matches the grammar" if first == "NoExtensionBias" else first
