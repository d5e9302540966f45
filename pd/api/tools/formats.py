"""The formats in which models write calls: which one a chat template teaches, its parser, its shape for grammars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pd.api.tools import hermes, llama3
from pd.api.tools.base import CallParser


@dataclass(frozen=True)
class CallFormat:
    """`opening` and `closing` are the markup of a call in a grammar, "" where a forced call has none."""

    name: str
    parser: type[CallParser]
    arguments_key: str
    separator: str
    opening: str = ""
    closing: str = ""

    @property
    def markup(self) -> tuple[str, ...]:
        """What must be seen in the text even if it is special tokens, which are otherwise left out of it."""
        return tuple(text for text in (self.parser.opening, self.closing) if text)


HERMES = CallFormat("hermes", hermes.HermesParser, "arguments", "\n", hermes.OPENING, hermes.CLOSING)
LLAMA3 = CallFormat("llama3", llama3.Llama3Parser, "parameters", llama3.SEPARATOR)
FORMATS: Mapping[str, CallFormat] = {format.name: format for format in (HERMES, LLAMA3)}

#: Of templates whose <tool_call> holds something else than the JSON of `hermes`.
_OTHER_CALLS = ("<function=", "<arg_key>")


def format_for(template: str) -> CallFormat | None:
    """The format that a chat template teaches; None where it is none of these."""
    if hermes.OPENING in template:
        known = "arguments" in template and not any(other in template for other in _OTHER_CALLS)
        return HERMES if known else None
    if llama3.OPENING in template or ("ipython" in template and '"parameters"' in template.replace('\\"', '"')):
        return LLAMA3
    return None
