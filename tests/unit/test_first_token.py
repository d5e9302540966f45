"""What a decode instance believes of a first token that a peer sends."""

from __future__ import annotations

import msgspec
import pytest

from pd import messages as m
from pd.scheduler.first_token import strange_result
from pd.scheduler.handoff import AttemptFailed, FirstTokenCame
from pd.scheduler.handoff_base import to_i32
from pd.scheduler.request import Request
from pd.scheduler.rooms import Result
from pd.types import HandoffId, SamplingParams
from tests.handoff_kit import Decode

WANTED = SamplingParams(seed=1, logprobs=True, top_logprobs=2, token_ids_logprob=(7,))


def first(token: int = 5, cached: int = 0, **changes: object) -> m.FirstToken:
    """A first token with everything that can come with it, for a prompt of ten tokens."""
    tops = m.TopLogprobs(2, to_i32([5, 6]), bytes(8))
    found = {"chosen_f32": bytes(4), "tops": tops, "wanted_f32": bytes(4)}
    rows = {
        "start": 8,
        "logprobs_f32": bytes(8),
        "tops": m.TopLogprobs(1, to_i32([5, 6]), bytes(8)),
        "wanted_f32": bytes(8),
    }
    for name, value in changes.items():
        which, _, field = name.partition("_")
        (found if which == "token" else rows)[field] = value
    logprobs, of_prompt = m.TokenLogprobs(**found), m.PromptLogprobs(**rows)  # type: ignore[arg-type]
    return m.FirstToken(HandoffId(0, 0, 0), [m.FirstChoice(token, logprobs)], cached, of_prompt)


def test_a_first_token_with_all_its_logprobs_is_handed_on() -> None:
    d = Decode(vocab_size=100)
    session = d.connect()
    id = d.ask(sampling=WANTED)
    d.said(session, msgspec.structs.replace(first(99, 8), id=id))
    (notice,) = d.notices
    assert isinstance(notice, FirstTokenCame)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (first(100), "first token, 100, is outside the vocabulary of 100"),
        (first(-1), "first token, -1, is outside"),
        (first(1 << 40), "is outside"),
        (first(cached=10), "10 cached tokens of 10"),
        (first(cached=-1), "-1 cached"),
        (m.FirstToken(HandoffId(0, 0, 0), [], 0), "0 first tokens for 1"),
        (first(token_chosen_f32=b""), "logprobs: 0 bytes"),
        (first(token_chosen_f32=bytes(3)), "logprobs: 3 bytes"),
        (first(token_wanted_f32=bytes(8)), "8 bytes for 1 tokens and 1 wanted"),
        (first(token_tops=m.TopLogprobs(2, to_i32([5, 100]), bytes(8))), "logprobs: an alternative is outside"),
        (first(token_tops=m.TopLogprobs(2, to_i32([-5, 6]), bytes(8))), "logprobs: an alternative is outside"),
        (first(token_tops=m.TopLogprobs(2, to_i32([5]), bytes(8))), "alternatives of 4 and 8"),
        (first(token_tops=m.TopLogprobs(0, b"", b"")), "x 0"),
        (first(token_tops=m.TopLogprobs(-2, b"", b"")), "x -2"),
        (first(prompt_start=-1), "from -1 on"),
        (first(prompt_start=9), "prompt logprobs of 2 tokens from 9 on, of 10"),
        (first(prompt_logprobs_f32=b""), "prompt logprobs of 0"),
        (first(prompt_logprobs_f32=bytes(7)), "prompt logprobs: 7 bytes"),
        (first(prompt_tops=m.TopLogprobs(1, to_i32([5, 100]), bytes(8))), "prompt logprobs: an alternative"),
        (first(prompt_wanted_f32=bytes(12)), "prompt logprobs: 12 bytes for 2 tokens"),
    ],
)
def test_what_a_peer_says_of_a_first_token_is_checked_before_anything_relies_on_it(
    message: m.FirstToken, problem: str
) -> None:
    d = Decode(vocab_size=100)
    session = d.connect()
    id = d.ask(sampling=WANTED)
    d.orders()
    d.said(session, msgspec.structs.replace(message, id=id))
    (notice,) = d.notices
    assert isinstance(notice, AttemptFailed) and notice.retryable and problem in notice.reason
    assert m.Cancel(id) in d.sent() and d.counts() == (17, 3, 0), "its blocks come back when the peer says so"


@pytest.mark.parametrize(
    ("problem", "found"),
    [
        ("", first()),
        ("outside the vocabulary", first(100)),
        ("10 cached tokens of 10", first(cached=10)),
        ("alternatives", first(prompt_tops=m.TopLogprobs(1, to_i32([5]), bytes(4)))),
        ("no logprobs", m.FirstToken(HandoffId(0, 0, 0), [m.FirstChoice(5)], 0)),
        ("2 first tokens", m.FirstToken(HandoffId(0, 0, 0), [m.FirstChoice(5, first().choices[0].logprobs)] * 2, 0)),
    ],
)
def test_what_a_leg_is_given_must_fit_its_request(problem: str, found: m.FirstToken) -> None:
    request = Request(1, "r", to_i32(range(10)), 10, WANTED)
    result = Result(tuple(found.choices), found.cached_tokens, found.prompt_logprobs)
    said = strange_result(result, request, 100)
    assert problem in said and bool(problem) == bool(said)
