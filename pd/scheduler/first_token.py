"""What a peer says of a first token is checked before anything relies on it.

A token id that the model does not have would end this instance's runner, an array of the wrong size its api: a peer may
cost a request another attempt, never more.
"""

from __future__ import annotations

import numpy as np

from pd import messages as m
from pd.scheduler.handoff_base import AskSpec
from pd.scheduler.request import Request
from pd.scheduler.rooms import Result


def strange_result(result: Result, request: Request, vocab_size: int) -> str:
    """What is wrong with the answer for a leg, which another instance may have given, or ""."""
    if request.sampling.logprobs and any(choice.logprobs is None for choice in result.choices):
        return "no logprobs"
    spec = AskSpec(bytes(request.tokens), request.prompt_len, request.sampling, 0, 0.0, 0, choices=request.choices)
    return strange_first_token(result, spec, vocab_size)


def strange_first_token(message: m.FirstToken | Result, spec: AskSpec, vocab_size: int) -> str:
    """What is wrong with the message, or ""."""
    if len(message.choices) != spec.choices:
        return f"{len(message.choices)} first tokens for {spec.choices} choices"
    if not 0 <= message.cached_tokens < spec.tokens:
        return f"{message.cached_tokens} cached tokens of {spec.tokens}"
    for choice in message.choices:
        if not 0 <= choice.token < vocab_size:
            return f"the first token, {choice.token}, is outside the vocabulary of {vocab_size}"
        if choice.logprobs is not None:
            values = choice.logprobs
            problem = _strange(1, values.chosen_f32, values.tops, values.wanted_f32, spec, vocab_size)
            if problem:
                return f"the first token's logprobs: {problem}"
    prompt = message.prompt_logprobs
    if prompt is None:
        return ""
    count = len(prompt.logprobs_f32) // 4
    if count < 1 or prompt.start < 0 or prompt.start + count > spec.prompt_len:
        return f"prompt logprobs of {count} tokens from {prompt.start} on, of {spec.prompt_len}"
    problem = _strange(count, prompt.logprobs_f32, prompt.tops, prompt.wanted_f32, spec, vocab_size)
    return f"prompt logprobs: {problem}" if problem else ""


def _strange(count: int, chosen: bytes, tops: m.TopLogprobs | None, wanted: bytes, spec: AskSpec, vocab: int) -> str:
    """What is wrong with the logprobs of `count` tokens."""
    if len(chosen) != 4 * count:
        return f"{len(chosen)} bytes for {count} tokens"
    if len(wanted) != 4 * count * len(spec.sampling.token_ids_logprob):
        return f"{len(wanted)} bytes for {count} tokens and {len(spec.sampling.token_ids_logprob)} wanted ids"
    if tops is None:
        return ""
    size = 4 * count * tops.width
    if tops.width < 1 or len(tops.ids_i32) != size or len(tops.logprobs_f32) != size:
        return f"alternatives of {len(tops.ids_i32)} and {len(tops.logprobs_f32)} bytes for {count} x {tops.width}"
    ids = np.frombuffer(tops.ids_i32, "<i4")
    if ids.min() < 0 or ids.max() >= vocab:
        return f"an alternative is outside the vocabulary of {vocab}"
    return ""
