"""A model's tokenizer from its directory: `tokenizers` and jinja2 only, since transformers would import torch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import tokenizers

from pd.api.chat_template import ChatTemplate, ChatTemplates
from pd.api.detokenizer import (
    CONTEXT_TOKENS,
    ByteLevelDetokenizer,
    Detokenizer,
    TokenPieces,
    WindowDetokenizer,
)
from pd.errors import ConfigError, ModelError

#: Texts up to this many characters are tokenised on the event loop: a thread's round trip costs more than they do.
INLINE_CHARACTERS = 1024

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _TokenizerFile(msgspec.Struct):
    """What pd itself reads of tokenizer.json; the rest is the library's."""

    decoder: dict[str, Any] | None = None


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = [part.get("type") for part in decoder.get("decoders", ()) if part.get("type") != "Fuse"]
        return parts == ["ByteLevel"]
    return decoder.get("type") == "ByteLevel"


class Tokenizer:
    """Encoding, decoding and the chat template of one model. Safe to use from the loop and a thread at once."""

    def __init__(self, path: str | Path, chat_template: str = "") -> None:
        """`chat_template` goes before the model's own. Raises ModelError when the directory has no usable
        tokenizer.json, ConfigError for a `chat_template` that does not compile.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        try:
            data = file.read_bytes()
            described = msgspec.json.decode(data, type=_TokenizerFile)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except FileNotFoundError as error:
            raise ModelError(str(path), "no tokenizer.json (save it with a fast tokenizer)") from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise ModelError(str(path), f"tokenizer.json cannot be read: {error}") from error
        # A truncation or padding stored by whoever trained it would silently change prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token.content: token_id for token_id, token in added.items()}
        self._byte_level = _is_byte_level(described.decoder)
        self._pieces = TokenPieces(self._tokenizer.id_to_token)
        self._pieces_skipping: dict[frozenset[int], TokenPieces] = {}  # by what is shown; one or two are ever used
        self._texts: dict[int, str] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="pd-tokenize")
        config = _read_json(directory / "tokenizer_config.json", str(path))
        special = _special_tokens(config, _read_json(directory / "special_tokens_map.json", str(path)))
        self.templates = _chat_templates(directory, config, special, chat_template)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """For chats without tools."""
        return self.templates.pick(tools=False)

    def special_id(self, text: str) -> int | None:
        """The id of a special token; None for what is ordinary text, in one token or not."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._special else None

    def added_id(self, text: str) -> int | None:
        """The id of a token that was added to the vocabulary, special or not, and is never made of others."""
        return self._added.get(text)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text. `encode_batch` releases the GIL where a plain `encode` holds it; long texts go to a
        thread so that the loop goes on.
        """
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self._encode(texts, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, texts, add_special_tokens)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    async def decode_many(self, many: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        """Texts of outputs of any length, in a thread."""
        lists = [list(ids) for ids in many]
        loop = asyncio.get_running_loop()
        decode = functools.partial(self._tokenizer.decode_batch, lists, skip_special_tokens=skip_special_tokens)
        return await loop.run_in_executor(self._thread, decode)

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for an id without one."""
        return self._tokenizer.id_to_token(token_id) or ""

    def detokenizer(
        self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """For one output that follows `prompt`. Of the special tokens those in `shown` are never skipped."""
        if self._byte_level:
            return ByteLevelDetokenizer(self._skipping(shown) if skip_special_tokens else self._pieces)

        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(ids, skip_special_tokens=False)

        skipped = self._special - shown if skip_special_tokens else frozenset()
        visible = (token_id for token_id in reversed(prompt) if token_id not in skipped)
        context = list(itertools.islice(visible, CONTEXT_TOKENS))
        return WindowDetokenizer(decode, context[::-1], skipped)

    def _skipping(self, shown: frozenset[int]) -> TokenPieces:
        pieces = self._pieces_skipping.get(shown)
        if pieces is None:
            pieces = TokenPieces(self._tokenizer.id_to_token, self._special - shown)
            self._pieces_skipping[shown] = pieces
        return pieces

    def token_text(self, token_id: int) -> str:
        """Text of one token in the middle of a text; an incomplete character shows as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            if self._byte_level:
                piece = self._pieces[token_id]
                text = piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
            else:
                before = self._tokenizer.decode(self._anchor, skip_special_tokens=False)
                text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)[len(before) :]
            self._texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; of an incomplete character its own bytes."""
        if self._byte_level:
            piece = self._pieces[token_id]
            return piece.encode() if isinstance(piece, str) else piece
        token = self._tokenizer.id_to_token(token_id) or ""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return self.token_text(token_id).encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    @cached_property
    def _anchor(self) -> list[int]:
        """An ordinary token to decode others after, so that decoders do not take them for the start of a text."""
        return list(self._tokenizer.encode("a", add_special_tokens=False).ids[-1:])

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _read_json(file: Path, model: str) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ModelError(model, f"{file.name} cannot be read: {error}") from error


def _special_tokens(*configs: dict[str, Any]) -> dict[str, str]:
    """bos_token and so on, each a string or an object with `content`; the first file that names one wins."""
    special: dict[str, str] = {}
    for config in configs:
        for name in _SPECIAL_NAMES:
            value = config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                special.setdefault(name, value)
    return special


def _chat_templates(directory: Path, config: dict[str, Any], special: dict[str, str], given: str) -> ChatTemplates:
    """`given`, else chat_template.jinja and additional_chat_templates/NAME.jinja, else `chat_template` of the
    configuration: a string, or a list of named ones.
    """
    named: dict[str, str] = {}
    file = directory / "chat_template.jinja"
    if given:
        named["default"] = given
    elif file.exists():
        named["default"] = file.read_text(encoding="utf-8")
        more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        named |= {path.stem: path.read_text(encoding="utf-8") for path in more}
    else:
        source = config.get("chat_template")
        entries = source if isinstance(source, list) else [{"name": "default", "template": source}]
        found = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
        named = {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}
    try:
        compiled = {
            name: ChatTemplate(source, special) for name, source in named.items() if name in ("default", "tool_use")
        }
    except jinja2.TemplateError as error:
        if given:
            raise ConfigError("--chat-template", f"the template does not compile: {error}") from error
        raise ModelError(str(directory), f"chat template does not compile: {error}") from error
    return ChatTemplates(compiled.get("default"), compiled.get("tool_use"))
