"""What a grammar accepts, judged by llguidance over single bytes."""

from __future__ import annotations

import functools

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class _Bytes:
    """Token i is byte i; 256 ends."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([value]) for value in range(256)), b"<eos>")

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@functools.cache
def _tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def accepts(grammar: str, text: str) -> bool:
    """Whether `text` is a whole output of the grammar, which must be one."""
    matcher = LLMatcher(_tokenizer(), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
