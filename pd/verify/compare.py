"""Two answers to the same request, position by position."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: One token as /generate shows it: (logprob or None, token id).
Token = tuple[float | None, int]


class Part(enum.Enum):
    """Which part of the system computed a position, as what to look at when it is wrong."""

    PROMPT = "prefill: a prompt logprob"
    FIRST = "prefill: the first token"
    LANDED = "prompt KV: the first step that reads it on the decode instance"
    DECODE = "decode: a step after the first"
    ANSWER = "the answer itself"


def part_of(position: int) -> Part:
    """Of an output position. The first token comes from the prompt's computation, wherever that was; the second is the

    first to read the prompt's KV where it landed, all of it; each later one reads what decoding wrote, too.
    """
    return Part.FIRST if position == 0 else Part.LANDED if position == 1 else Part.DECODE


@dataclass(frozen=True)
class Output:
    """One choice. `tops[i]` maps token ids to logprobs at output position i; `prompt` begins at `prompt_start`."""

    ids: list[int]
    tokens: list[Token]
    tops: list[dict[int, float]] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    finish: str = ""
    text: str = ""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Output:
        """From an answer of /generate."""
        meta = answer["meta_info"]
        tops = [{row[1]: row[0] for row in rows or ()} for rows in meta.get("output_top_logprobs") or ()]
        finish = meta["finish_reason"]
        return cls(
            ids=list(answer["output_ids"]),
            tokens=[(row[0], row[1]) for row in meta.get("output_token_logprobs") or ()],
            tops=tops,
            prompt=[(row[0], row[1]) for row in meta.get("input_token_logprobs") or ()],
            finish=f"{finish['type']} {finish.get('matched', '')}".strip() if finish else "none",
            text=answer.get("text", ""),
        )


@dataclass(frozen=True)
class Divergence:
    """The first place at which two answers differ. `position` counts within its part: prompt or output."""

    part: Part
    choice: int
    position: int
    got: str
    want: str

    def __str__(self) -> str:
        where = "" if self.part is Part.ANSWER else f" {self.position}"
        return f"choice {self.choice}, {self.part.value}{where}: got {self.got}, reference {self.want}"


@dataclass(frozen=True)
class Verdict:
    """Of one choice. `worst` is the largest difference of two logprobs that were compared.

    `tie` is the output position from which the answers part although both are right: two tokens were equally likely
    within the tolerance.
    """

    divergence: Divergence | None = None
    worst: float = 0.0
    tie: int | None = None


@dataclass(frozen=True)
class Rule:
    """`tolerance`: of logprobs. `exact_draws`: a sampled token must be the same; without, equal logprobs suffice."""

    tolerance: float
    exact_draws: bool = True


def compare(got: Sequence[Output], want: Sequence[Output], rule: Rule, *, sampled: bool) -> list[Verdict]:
    """One verdict for each choice of the reference."""
    if len(got) != len(want):
        difference = Divergence(Part.ANSWER, 0, 0, f"{len(got)} outputs", f"{len(want)} outputs")
        return [Verdict(difference)]
    pairs = enumerate(zip(got, want, strict=True))
    return [_Comparison(index, mine, theirs, rule, sampled).verdict() for index, (mine, theirs) in pairs]


class _Comparison:
    def __init__(self, choice: int, got: Output, want: Output, rule: Rule, sampled: bool) -> None:
        self._choice, self._got, self._want, self._rule, self._sampled = choice, got, want, rule, sampled
        self._worst = 0.0

    def verdict(self) -> Verdict:
        found = self._prompt()
        if found is not None:
            return Verdict(found, self._worst)
        found, tie = self._output()
        if found is None and tie is None:
            found = self._end()
        return Verdict(found, self._worst, tie)

    def _at(self, part: Part, position: int, got: str, want: str) -> Divergence:
        return Divergence(part, self._choice, position, got, want)

    def _prompt(self) -> Divergence | None:
        got, want = self._got.prompt, self._want.prompt
        if len(got) != len(want):
            return self._at(Part.PROMPT, 0, f"{len(got)} prompt logprobs", f"{len(want)}")
        for position, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            if not self._same(mine, theirs):
                return self._at(Part.PROMPT, position, _show(mine), _show(theirs))
        return None

    def _output(self) -> tuple[Divergence | None, int | None]:
        for position, (mine, theirs) in enumerate(zip(self._got.tokens, self._want.tokens, strict=False)):
            if self._same(mine, theirs):
                continue
            if mine[1] != theirs[1] and self._excused(position, mine, theirs):
                return None, position
            return self._at(part_of(position), position, _show(mine), _show(theirs)), None
        return None, None

    def _excused(self, position: int, mine: Token, theirs: Token) -> bool:
        """Whether another token is no damage: an equal logprob (greedy), or noise that moved a draw (inexact ones)."""
        tops = self._want.tops[position] if position < len(self._want.tops) else {}
        if mine[1] not in tops or mine[0] is None or theirs[0] is None:
            return self._sampled and not self._rule.exact_draws
        if abs(mine[0] - tops[mine[1]]) > self._rule.tolerance:
            return False
        if self._sampled:
            return not self._rule.exact_draws
        return abs(tops[mine[1]] - theirs[0]) <= self._rule.tolerance

    def _end(self) -> Divergence | None:
        got, want = self._got, self._want
        if len(got.tokens) != len(want.tokens):
            position = min(len(got.tokens), len(want.tokens))
            return self._at(part_of(position), position, f"{len(got.tokens)} tokens", f"{len(want.tokens)} tokens")
        for name in ("ids", "finish", "text"):
            mine, theirs = getattr(got, name), getattr(want, name)
            if theirs and mine != theirs:
                return self._at(Part.ANSWER, 0, f"{name} {mine!r}", f"{theirs!r}")
        return None

    def _same(self, mine: Token, theirs: Token) -> bool:
        if mine[1] != theirs[1]:
            return False
        if mine[0] is None or theirs[0] is None:
            return mine[0] is theirs[0]
        difference = abs(mine[0] - theirs[0])
        if not difference <= self._rule.tolerance:  # NaN, too
            return False
        self._worst = max(self._worst, difference)
        return True


def _show(token: Token) -> str:
    logprob = "no logprob" if token[0] is None else f"logprob {token[0]:.6f}" if math.isfinite(token[0]) else "NaN"
    return f"token {token[1]} ({logprob})"
