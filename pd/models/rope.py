"""Rotary position embedding as config.json describes it, in both of its spellings. No torch.

transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`. A field that the rope type
does not define is an error: it is there because some model computes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pd.errors import ModelError

#: Rope type -> the fields that it defines beyond these two.
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_FIELDS: dict[str, frozenset[str]] = {
    # Older configurations keep the context length beside any type; it means nothing to these three.
    "default": frozenset({"original_max_position_embeddings"}),
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
ROPE_TYPES = tuple(_FIELDS)


@dataclass(frozen=True)
class RopeConfig:
    """`kind` is one of ROPE_TYPES. `factor` divides frequencies; which ones, `pd.models.layers` says for each kind.

    `attention_factor` multiplies cosine and sine. Up to `original_context` positions the model was trained as it is.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def reach(self) -> int:
        """Positions that YaRN stretches the model to, where config.json keeps the original length; else 0."""
        return int(self.original_context * self.factor) if self.kind == "yarn" else 0


def rope_config(path: str, raw: Mapping[str, Any], context: int) -> RopeConfig:
    """`context`: max_position_embeddings. Raises ModelError naming the field that cannot be served.

    "dynamic" (NTK) changes frequencies beyond `context` only, where nothing is served, so within it equals "default".
    """
    # Where both spellings are there, the earlier one counts, as in transformers 5.
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(fields, Mapping):
        raise ModelError(path, f"config.json: RoPE parameters must be an object, not {fields!r}")
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in _FIELDS:
        raise ModelError(path, f"config.json: rope type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
    unknown = sorted(set(fields) - _COMMON - _FIELDS[kind])
    if unknown:
        raise ModelError(path, f"config.json: {unknown[0]!r} in the RoPE parameters is not supported for {kind!r}")
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(path, f"config.json: partial_rotary_factor {partial!r} is not supported (only 1)")
    theta = fields.get("rope_theta", raw.get("rope_theta"))
    theta = 10_000.0 if theta is None else theta
    original = raw.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings") or context
    try:
        return _KINDS[kind](float(theta), int(original), context, fields)
    except KeyError as missing:
        raise ModelError(path, f"config.json: rope type {kind!r} needs {missing.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(path, f"config.json: RoPE parameters: {error}") from error


def _default(theta: float, original: int, context: int, fields: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(theta, original_context=context)


def _linear(theta: float, original: int, context: int, fields: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(theta, "linear", _factor(fields["factor"]), original_context=context)


def _llama3(theta: float, original: int, context: int, fields: Mapping[str, Any]) -> RopeConfig:
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    if not 0 < low < high:
        raise ValueError(f"low_freq_factor {low:g} and high_freq_factor {high:g} are no range")
    return RopeConfig(theta, "llama3", _factor(fields["factor"]), low, high, original)


def _yarn(theta: float, original: int, context: int, fields: Mapping[str, Any]) -> RopeConfig:
    if original < 1 or theta <= 1:
        raise ValueError(f"original_max_position_embeddings {original} or rope_theta {theta:g} is too small")
    factor = _factor(context / original if fields["factor"] is None else fields["factor"])
    attention = fields.get("attention_factor")
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_context=original,
        attention_factor=_yarn_attention_factor(factor, fields) if attention is None else float(attention),
        beta_fast=float(fields.get("beta_fast") or 32),
        beta_slow=float(fields.get("beta_slow") or 1),
        truncate=bool(fields.get("truncate", True)),
    )


def _yarn_attention_factor(factor: float, fields: Mapping[str, Any]) -> float:
    """What the paper suggests for `factor`, or the quotient that mscale and mscale_all_dim ask for together."""

    def suggested(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, everywhere = fields.get("mscale"), fields.get("mscale_all_dim")
    return suggested(mscale) / suggested(everywhere) if mscale and everywhere else suggested(1.0)


def _factor(value: Any) -> float:
    factor = float(value)
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor {value!r} is not a positive number")
    return factor


_KINDS: dict[str, Callable[[float, int, int, Mapping[str, Any]], RopeConfig]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
}
