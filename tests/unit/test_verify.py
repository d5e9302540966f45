"""What `pd verify` says of two answers, without a server."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import pytest

from pd.errors import ConfigError
from pd.verify.client import AskFailed, _last_events
from pd.verify.command import first_divergence, rule_for
from pd.verify.compare import Divergence, Output, Part, Rule, Verdict, compare
from pd.verify.options import add_arguments, resolve
from pd.verify.workload import Facts, workload

EXACT, NOISY = Rule(1e-4), Rule(0.1, exact_draws=False)


def output(*tokens: tuple[float | None, int], **fields: Any) -> Output:
    fields.setdefault("tops", [{} for _ in tokens])
    return Output([token for _, token in tokens], list(tokens), **fields)


def verdict(got: Output, want: Output, rule: Rule = EXACT, *, sampled: bool = False) -> Verdict:
    (found,) = compare([got], [want], rule, sampled=sampled)
    return found


def divergence(got: Output, want: Output, rule: Rule = EXACT, *, sampled: bool = False) -> Divergence:
    found = verdict(got, want, rule, sampled=sampled).divergence
    assert found is not None
    return found


def test_equal_answers_have_no_divergence_and_tell_the_largest_difference() -> None:
    found = verdict(output((-1.0, 5), (-2.0, 6)), output((-1.00003, 5), (-2.0, 6)))
    assert found.divergence is None and found.tie is None
    assert found.worst == pytest.approx(3e-5)


@pytest.mark.parametrize(("position", "part"), [(0, Part.FIRST), (1, Part.LANDED), (2, Part.DECODE), (5, Part.DECODE)])
def test_a_wrong_logprob_is_found_although_every_token_is_right(position: int, part: Part) -> None:
    right = [(-1.0, 10 + n) for n in range(6)]
    wrong = [*right]
    wrong[position] = (-1.001, right[position][1])
    found = divergence(output(*wrong), output(*right))
    assert (found.part, found.position) == (part, position)


def test_a_prompt_logprob_comes_before_everything_else() -> None:
    got = output((-1.0, 5), prompt=[(None, 1), (-2.0, 2), (-3.5, 3)])
    want = output((-9.0, 6), prompt=[(None, 1), (-2.0, 2), (-3.0, 3)])
    found = divergence(got, want)
    assert (found.part, found.position) == (Part.PROMPT, 2)


def test_a_missing_prompt_logprob_is_a_divergence() -> None:
    assert divergence(output((-1.0, 5)), output((-1.0, 5), prompt=[(None, 1)])).part is Part.PROMPT
    got, want = output((-1.0, 5), prompt=[(-1.0, 1)]), output((-1.0, 5), prompt=[(None, 1)])
    assert divergence(got, want).part is Part.PROMPT


def test_nan_never_counts_as_equal() -> None:
    assert divergence(output((math.nan, 5)), output((-1.0, 5))).part is Part.FIRST
    assert divergence(output((-1.0, 5)), output((math.nan, 5))).part is Part.FIRST


def test_two_equally_likely_greedy_tokens_are_a_tie_and_end_the_comparison() -> None:
    want = output((-1.0, 5), (-2.0, 6), tops=[{5: -1.0, 7: -1.00005}, {}])
    found = verdict(output((-1.00005, 7), (-8.0, 9)), want)
    assert found.divergence is None and found.tie == 0


def test_another_greedy_token_that_is_less_likely_is_a_divergence() -> None:
    want = output((-1.0, 5), tops=[{5: -1.0, 7: -1.2}])
    assert divergence(output((-1.2, 7)), want).part is Part.FIRST


def test_a_token_whose_logprob_disagrees_is_never_a_tie() -> None:
    want = output((-1.0, 5), tops=[{5: -1.0, 7: -1.0}])
    assert divergence(output((-1.5, 7)), want).part is Part.FIRST


def test_another_draw_is_a_divergence_unless_draws_are_noisy() -> None:
    got, want = output((-3.0, 7)), output((-1.0, 5), tops=[{5: -1.0, 7: -3.0}])
    assert divergence(got, want, EXACT, sampled=True).part is Part.FIRST
    assert verdict(got, want, NOISY, sampled=True).tie == 0
    assert divergence(output((-2.0, 7)), want, NOISY, sampled=True).part is Part.FIRST


def test_a_cut_answer_is_a_divergence_where_it_ends() -> None:
    found = divergence(output((-1.0, 5)), output((-1.0, 5), (-2.0, 6)))
    assert (found.part, found.position) == (Part.LANDED, 1)


@pytest.mark.parametrize("name", ["finish", "text"])
def test_a_different_end_is_a_divergence_where_the_reference_knows_it(name: str) -> None:
    tokens = [(-1.0, 5)]
    assert divergence(output(*tokens, **{name: "a"}), output(*tokens, **{name: "b"})).part is Part.ANSWER
    assert verdict(output(*tokens, **{name: "a"}), output(*tokens)).divergence is None


def test_a_missing_choice_is_a_divergence() -> None:
    (found,) = compare([output((-1.0, 5))], [output((-1.0, 5))] * 2, EXACT, sampled=False)
    assert found.divergence is not None and found.divergence.part is Part.ANSWER


def test_of_several_choices_the_earliest_position_is_named() -> None:
    right = output((-1.0, 5), (-1.0, 6), (-1.0, 7))
    late, early = output((-1.0, 5), (-1.0, 6), (-2.0, 7)), output((-1.0, 5), (-2.0, 6), (-1.0, 7))
    found = first_divergence(compare([late, early], [right, right], EXACT, sampled=False))
    assert found is not None and (found.choice, found.position) == (1, 1)
    assert "choice 1, prompt KV" in str(found)


def test_an_answer_of_generate_is_read_in_full() -> None:
    meta = {
        "finish_reason": {"type": "stop", "matched": "x"},
        "output_token_logprobs": [[-1.0, 5, None]],
        "output_top_logprobs": [[[-1.0, 5, None], [-2.0, 6, None]]],
        "input_token_logprobs": [[None, 3, None]],
    }
    found = Output.of({"text": "t", "output_ids": [5], "meta_info": meta})
    assert found == Output([5], [(-1.0, 5)], [{5: -1.0, 6: -2.0}], [(None, 3)], "stop x", "t")


def event(index: int, text: str) -> bytes:
    return b"data: %s\n\n" % json.dumps({"index": index, "text": text}).encode()


def test_of_a_stream_the_last_event_of_each_output_counts() -> None:
    body = event(1, "b") + event(0, "a") + event(1, "bb") + b"data: [DONE]\n\n"
    assert [found["text"] for found in _last_events(body)] == ["a", "bb"]


@pytest.mark.parametrize("body", [event(0, "a"), event(0, "a") + b'data: {"error": {"message": "gone"}}\n\n'])
def test_a_stream_that_is_cut_or_fails_is_no_answer(body: bytes) -> None:
    with pytest.raises(AskFailed):
        _last_events(body)


def test_the_workload_is_the_same_for_the_same_seed_and_fits_the_model() -> None:
    facts = Facts(vocab_size=256, context_length=300, page_size=16)
    cases = workload(facts, 1)
    assert cases == workload(facts, 1) != workload(facts, 2)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        for prompt in case.prompts:
            assert len(prompt) + case.sampling["max_new_tokens"] < facts.context_length
            assert all(0 <= token < facts.vocab_size for token in prompt)


def resolved(*argv: str, **environ: str) -> Any:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(parser.parse_args(argv), environ)


def test_an_address_needs_no_scheme() -> None:
    assert resolved("localhost:8000/").url == "http://localhost:8000"


def test_the_key_is_the_one_that_was_given_or_the_deployments_own_variable() -> None:
    assert resolved("x").api_key == ""
    assert resolved("x", PD_API_KEY="a").api_key == "a"
    assert resolved("x", "--api-key", "b", PD_API_KEY="a").api_key == "b"


@pytest.mark.parametrize(
    ("dtypes", "asked", "rule"),
    [
        (["float32"], None, Rule(1e-4)),
        (["float16"], None, Rule(0.1, exact_draws=False)),
        (["float32", "bfloat16"], None, Rule(0.5, exact_draws=False)),
        (["bfloat16"], 0.2, Rule(0.2, exact_draws=False)),
        (["float32", "fp8_e4m3"], None, Rule(0.05, exact_draws=False)),
        (["bfloat16", "fp8_e4m3"], None, Rule(0.5, exact_draws=False)),
        ([], None, Rule(1e-4)),
    ],
)
def test_the_coarsest_weights_set_the_tolerance(dtypes: list[str], asked: float | None, rule: Rule) -> None:
    assert rule_for(dtypes, asked) == rule


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["x", "--json", "/nowhere/at/all"], "--json"),
        (["x", "--json", "/tmp"], "--json"),
        (["ftp://x"], "URL"),
        (["x", "--reference", "http://"], "--reference"),
        (["x", "--model", "/nowhere/at/all"], "--model"),
        (["x", "--model", "/tmp", "--reference", "http://y"], "--model"),
        (["x", "--tolerance", "0"], "--tolerance"),
        (["x", "--timeout", "-1"], "--timeout"),
    ],
)
def test_a_wrong_argument_is_named(argv: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as found:
        resolved(*argv)
    assert found.value.field == field
