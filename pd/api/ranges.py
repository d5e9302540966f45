"""Which values the fields of requests may have, as JSON Schema: what the checks accept and types cannot say.

Checked against the endpoints by test, at both ends of every range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pd.api.context import Limits, Served
from pd.api.params import MAX_STOP_LENGTH, MAX_STOPS, MAX_TOP_LOGPROBS
from pd.types import MAX_CHOICES

Ranges = Mapping[str, Mapping[str, Any]]

_INT64 = {"minimum": -(1 << 63), "maximum": (1 << 63) - 1}
_PENALTY = {"minimum": -2.0, "maximum": 2.0}

#: Fields of every request, by name.
_ANYWHERE: Ranges = {
    "temperature": {"minimum": 0.0, "maximum": 100.0},
    "top_p": {"exclusiveMinimum": 0.0, "maximum": 1.0},
    "min_p": {"minimum": 0.0, "maximum": 1.0},
    "top_k": {"minimum": -1, "maximum": (1 << 31) - 1},
    "seed": _INT64,
    "sampling_seed": _INT64,
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": {"exclusiveMinimum": 0.0, "maximum": 100.0},
    "priority": {"minimum": -(1 << 31), "maximum": (1 << 31) - 1},
    "min_tokens": {"minimum": 0},
    "min_new_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 1},
    "bootstrap_room": {"minimum": 0, "maximum": (1 << 63) - 1},
    "bootstrap_port": {"minimum": 1, "maximum": 65535},
    "logprob_start_len": {"minimum": -1},
    "top_logprobs_num": {"minimum": 0, "maximum": MAX_TOP_LOGPROBS},
    "truncate_prompt_tokens": {"minimum": -1, "not": {"const": 0}},
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
}

_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}

#: What templates know; further members go to them as they are.
_MESSAGE: Mapping[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
    },
}


#: Of these fields exactly one must be there.
_EITHER: Mapping[str, tuple[str, str]] = {
    "GenerateRequest": ("text", "input_ids"),
    "TokenizeRequest": ("prompt", "messages"),
}


def narrow(name: str, schema: dict[str, Any], served: Served, limits: Limits) -> None:
    """The properties of one request's schema, `name`, are what is accepted."""
    token = {"type": "integer", "minimum": 0, "maximum": served.limits.vocab_size - 1}
    own: dict[str, Mapping[str, Any]] = {
        **_ANYWHERE,
        "max_tokens": {"minimum": 0 if name == "CompletionRequest" else 1},  # 0: with echo
        "max_new_tokens": {"minimum": 0},
        "logprobs": {"minimum": 0, "maximum": limits.top_logprobs},
        "top_logprobs": {"minimum": 0, "maximum": limits.top_logprobs},
        "prompt_logprobs": {"minimum": 0, "maximum": limits.top_logprobs},
    }
    if name in _EITHER:
        schema["oneOf"] = [{"required": [field]} for field in _EITHER[name]]
    for field, value in schema.get("properties", {}).items():
        for form in _forms(value):
            if form.get("type") in ("integer", "number"):
                form.update(own.get(field, {}))
            elif form.get("type") == "array":
                _narrow_list(field, form, token, own.get(field, {}))
            elif field == "stop":
                form.update(minLength=1, maxLength=MAX_STOP_LENGTH)
            elif field == "logit_bias" and form.get("type") == "object":
                form["propertyNames"] = {"pattern": "^[0-9]{1,10}$"}
                form["additionalProperties"] = {"type": "number", "minimum": -100.0, "maximum": 100.0}
        if field in _EITHER.get(name, ()):
            value["anyOf"] = [form for form in _forms(value) if form.get("type") != "null"]
        if field == "model":
            names = ["", "default", served.name, served.path]
            value["anyOf"] = [{"enum": [*dict.fromkeys(names)]}, {"type": "null"}]


def _narrow_list(field: str, form: dict[str, Any], token: Mapping[str, Any], item: Mapping[str, Any]) -> None:
    if field in ("prompt", "input_ids", "text", "tokens"):
        texts = [{"type": "string"}]
        ids: list[dict[str, Any]] = [{**token}, {"type": "array", "items": token, "minItems": int(field != "tokens")}]
        kinds = {"text": texts, "input_ids": ids, "tokens": ids}.get(field, texts + ids)
        if "integer" not in repr(form):
            kinds = texts
        form.pop("items", None)
        form["anyOf"] = [{"items": kind} for kind in kinds]  # all of one kind
        form["minItems"] = int(field not in ("tokens",))
    elif field == "messages":
        form.update(items=_MESSAGE, minItems=1)
    elif field == "stop":
        form.update(items={"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}, maxItems=MAX_STOPS)
    elif field == "stop_token_ids":
        form["items"] = token
    elif field == "token_ids_logprob":
        form.pop("items", None)
        form["anyOf"] = [{"items": token}, {"items": {"type": "array", "items": token}}]
    else:
        for inner in _forms(form.get("items", {})):
            if inner.get("type") in ("integer", "number"):
                inner.update(item)


def _forms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema's alternatives, or itself."""
    return schema.get("anyOf") or [schema]
