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

    def is_special(self, token_id: int) -> bool: ...


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


class TokenNumbers:
    """Shows each token as "token_id:N" (`return_tokens_as_token_ids`), which is the same for no two tokens."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}"

    def token_bytes(self, token_id: int) -> bytes:
        return self._texts.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        return self._texts.is_special(token_id)


def prompt_logprobs(texts: TokenTexts, ids: Sequence[int], logprobs: Logprobs, top: int) -> list[Any]:
    """vLLM's `prompt_logprobs`: by token id, the prompt's own token first; null for the first position.

    `rank` is null for a prompt token that is not among the `top` alternatives.
    """
    found: list[Any] = []
    for at, (token_id, logprob) in enumerate(zip(ids, logprobs.chosen, strict=True)):
        if logprob != logprob:
            found.append(None)
            continue
        pairs = [*zip(*logprobs.tops[at], strict=True)][:top] if logprobs.tops else []
        ranks = {other: rank for rank, (other, _) in enumerate(pairs, 1)}
        found.append(
            {
                str(other): {"logprob": value(one), "rank": ranks.get(other), "decoded_token": texts.token_text(other)}
                for other, one in {token_id: logprob, **dict(pairs)}.items()
            }
        )
    return found


class CompletionLogprobs:
    """Completions' `logprobs`, whose text offsets run on from chunk to chunk.

    `names`: how tokens are shown. `skips`: special tokens are not in the output's text.
    """

    def __init__(self, texts: TokenTexts, top: int, names: TokenTexts | None = None, *, skips: bool = True) -> None:
        self._texts, self._top, self._names, self._skips = texts, top, names or texts, skips
        self._offset = 0
        self._prompt: dict[str, list[Any]] | None = None

    def add_prompt(self, ids: Sequence[int], logprobs: Logprobs, text: str) -> None:
        """The answer begins with its prompt (`echo`). A special token that is not in its `text` takes no room there."""
        self._prompt = found = self._lists()
        for at, token_id in enumerate(ids):
            token = self._texts.token_text(token_id)
            hidden = self._texts.is_special(token_id) and not text.startswith(token, self._offset)
            self._add(found, token_id, 0 if hidden else len(token), logprobs, at)
        self._offset = len(text)

    def format(self, ids: Sequence[int], logprobs: Logprobs, begin: int) -> dict[str, Any]:
        """Of the tokens from `begin` on, after those of the prompt, once."""
        found, self._prompt = self._prompt or self._lists(), None
        for at in range(begin, len(ids)):
            hidden = self._skips and self._texts.is_special(ids[at])
            self._add(found, ids[at], 0 if hidden else len(self._texts.token_text(ids[at])), logprobs, at)
        return {**found, "top_logprobs": found["top_logprobs"] or None}

    @staticmethod
    def _lists() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def _add(self, found: dict[str, list[Any]], token_id: int, width: int, logprobs: Logprobs, at: int) -> None:
        logprob = logprobs.chosen[at]
        found["tokens"].append(self._names.token_text(token_id))
        found["token_logprobs"].append(value(logprob))
        found["text_offset"].append(self._offset)
        self._offset += width
        if self._top and logprobs.tops:
            known = logprob == logprob
            found["top_logprobs"].append(self._alternatives(logprobs.tops[at], token_id, logprob) if known else None)

    def _alternatives(self, alternatives: Alternatives, chosen: int, logprob: float) -> dict[str, float | None]:
        """Alternatives and, as OpenAI does, the sampled token if it is not among them."""
        pairs = [*[*zip(*alternatives, strict=True)][: self._top], (chosen, logprob)]
        named: dict[str, float | None] = {}
        for other, other_logprob in pairs:
            named.setdefault(self._names.token_text(other), value(other_logprob))
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
