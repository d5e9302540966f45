"""Logprobs in the three APIs' shapes. Values that JSON lacks: NaN (no logprob) is null, -inf is -9999."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pd.api.exchange import Alternatives, Logprobs

LOWEST = -9999.0


class TokenTexts(Protocol):
    """What formatting needs of a tokenizer."""

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def value(logprob: float) -> float | None:
    """None for NaN."""
    return max(logprob, LOWEST) if logprob == logprob else None


def chat(texts: TokenTexts, ids: Sequence[int], logprobs: Logprobs, begin: int, tops: bool) -> dict[str, Any]:
    """Chat's `logprobs` of the tokens from `begin` on."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": texts.token_text(token_id),
            "logprob": value(logprob),
            "bytes": list(texts.token_bytes(token_id)),
        }

    content = []
    for at in range(begin, len(ids)):
        item = entry(ids[at], logprobs.chosen[at])
        pairs = zip(*logprobs.tops[at], strict=True) if tops and logprobs.tops else ()
        item["top_logprobs"] = [entry(token_id, logprob) for token_id, logprob in pairs]
        content.append(item)
    return {"content": content}


class CompletionLogprobs:
    """Completions' `logprobs`, whose text offsets run on from chunk to chunk."""

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts, self._top = texts, top
        self._offset = 0

    def format(self, ids: Sequence[int], logprobs: Logprobs, begin: int) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for at in range(begin, len(ids)):
            text = self._texts.token_text(ids[at])
            found["tokens"].append(text)
            found["token_logprobs"].append(value(logprobs.chosen[at]))
            found["text_offset"].append(self._offset)
            self._offset += len(text)
            if self._top and logprobs.tops:
                found["top_logprobs"].append(self._alternatives(logprobs.tops[at], ids[at], logprobs.chosen[at]))
        return {**found, "top_logprobs": found["top_logprobs"] or None}

    def _alternatives(self, alternatives: Alternatives, chosen: int, logprob: float) -> dict[str, float | None]:
        """Alternatives and, as OpenAI does, the sampled token if it is not among them."""
        pairs = [*zip(*alternatives, strict=True), (chosen, logprob)]
        named: dict[str, float | None] = {}
        for token_id, token_logprob in pairs:
            named.setdefault(self._texts.token_text(token_id), value(token_logprob))
        return named


class NativeLogprobs:
    """SGLang's triples [logprob, token id, text or null]."""

    def __init__(self, texts: TokenTexts, with_text: bool) -> None:
        self._texts, self._with_text = texts, with_text

    def tokens(self, ids: Sequence[int], chosen: Sequence[float]) -> list[list[Any]]:
        return [self._triple(token_id, logprob) for token_id, logprob in zip(ids, chosen, strict=False)]

    def tops(self, tops: Sequence[Alternatives]) -> list[list[list[Any]] | None]:
        """One list per position; null where the position has no logprob (the first of a prompt)."""
        return [self._alternatives(*alternatives) for alternatives in tops]

    def wanted(self, ids: Sequence[int], rows: Sequence[Sequence[float]]) -> list[list[list[Any]] | None]:
        return [self._alternatives(ids, row) for row in rows]

    def _alternatives(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[list[Any]] | None:
        if not logprobs or logprobs[0] != logprobs[0]:
            return None
        return [self._triple(token_id, logprob) for token_id, logprob in zip(ids, logprobs, strict=True)]

    def _triple(self, token_id: int, logprob: float) -> list[Any]:
        return [value(logprob), token_id, self._texts.token_text(token_id) if self._with_text else None]
