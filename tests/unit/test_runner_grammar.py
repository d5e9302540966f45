"""Constrained sampling by a real worker: every output matches, wherever it begins, whatever else is in the batch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pd.api import grammar
from pd.messages import GrammarCompile, StepDone
from pd.runner import grammar as runner_grammar
from pd.runner.grammar import Grammars
from pd.testing import tiny_tokenizer
from pd.types import SamplingParams
from tests.oracle import Oracle, tiny_model
from tests.worker_driver import KIND, Driver, Track

EOS = 1
PATTERN = r"[a-c]{2,6}(-[0-9]{1,3})*|é+!"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["kind", "legs", "tags"],
    "additionalProperties": False,
}
REGEX = grammar.from_regex(PATTERN, "regex")
JSON = grammar.from_json_schema(SCHEMA, "schema", grammar.JsonLayout(whitespace=False))
PROMPT = [*b"What is it? "]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose tokens are the bytes. 1 is its end token."""
    return tiny_model(tmp_path_factory.mktemp("models"), "llama", tokenizer=True)


@pytest.fixture(params=["host", "device"], autouse=True)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both workers; the GPU's computes with its kernels' references here."""
    token = KIND.set(request.param)
    yield request.param
    KIND.reset(token)


@pytest.fixture
def grammars(path: str) -> Iterator[Grammars]:
    made = Grammars(path, 256, [EOS])
    yield made
    made.close()


@pytest.fixture
def driver(path: str, grammars: Grammars) -> Driver:
    return Driver(path, num_blocks=600, grammars=grammars)


def draw(constraint: str, seed: int = 0, **fields: Any) -> SamplingParams:
    fields = {"temperature": 1.0, "stop_token_ids": (EOS,), **fields}
    return SamplingParams(grammar=constraint, seed=seed, **fields)


def finish(driver: Driver, limit: int = 200) -> list[StepDone]:
    """Run every request to its end token, as a scheduler does: one step more has been ordered by then."""
    done = []
    live = list(driver.tracks.values())
    for _ in range(limit):
        if not live:
            return done
        done.append(driver.step({track.key: len(track.tokens) - track.computed for track in live}))
        live = [track for track in live if EOS not in track.emitted[:-1]]
    raise AssertionError(f"{[bytes(track.emitted) for track in live]} did not end in {limit} steps")


def text(track: Track) -> str:
    end = track.emitted.index(EOS)
    assert track.emitted[end:] == [EOS, EOS], "the surplus token is another end"
    return bytes(track.emitted[:end]).decode()


def check_json(value: str) -> None:
    found = json.loads(value)
    assert list(found) == ["kind", "legs", "tags"]
    assert found["kind"] in ("cat", "dog")
    assert type(found["legs"]) is int and 0 <= found["legs"] <= 9
    assert len(found["tags"]) <= 2 and all(isinstance(tag, str) and len(tag) <= 3 for tag in found["tags"])


def test_every_output_matches_its_grammar(driver: Driver) -> None:
    for seed in range(25):
        driver.admit(seed, PROMPT, draw(REGEX, seed))
        driver.admit(100 + seed, PROMPT, draw(JSON, seed))
    assert not any(step.failed for step in finish(driver))
    words = {text(driver.tracks[seed]) for seed in range(25)}
    assert len(words) > 15 and all(re.fullmatch(PATTERN, word) for word in words)
    for seed in range(25):
        check_json(text(driver.tracks[100 + seed]))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 1},
        {"top_p": 0.1},
        {"min_p": 0.9},
        {"repetition_penalty": 1.8, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"logit_bias": {ord("z"): 100.0, ord("c"): -100.0, EOS: 3.0}},
    ],
)
def test_no_way_to_draw_leads_out_of_the_grammar(driver: Driver, fields: dict[str, Any]) -> None:
    limited = grammar.from_regex(r"(ab|c){1,9}(-[0-9]){2,3}", "regex")
    for seed in range(5):
        driver.admit(seed, PROMPT, draw(limited, seed, **fields))
    finish(driver)
    assert all(re.fullmatch(r"(ab|c){1,9}(-[0-9]){2,3}", text(track)) for track in driver.tracks.values())


def test_a_request_that_goes_on_elsewhere_goes_on_at_its_place_in_the_grammar(path: str, grammars: Grammars) -> None:
    whole = Driver(path, grammars=grammars)
    track = whole.admit(1, PROMPT, draw(JSON, 3))
    finish(whole)
    others = Driver(path, num_blocks=600, grammars=grammars)
    last = track.emitted.index(EOS)
    for cut in range(1, last + 1):
        others.admit(cut, PROMPT + track.emitted[:cut], draw(JSON, 3), prompt_len=len(PROMPT))
    finish(others)
    for cut in range(1, last + 1):
        assert others.tracks[cut].emitted == track.emitted[cut:], cut


def test_the_others_in_the_batch_do_not_notice(path: str, driver: Driver) -> None:
    free = {key: SamplingParams(temperature=0.9, seed=key, logprobs=True) for key in range(4)}
    alone = Driver(path)
    for key, sampling in free.items():
        alone.admit(key, PROMPT, sampling)
        driver.admit(key, PROMPT, sampling)
    driver.admit(9, PROMPT, draw(JSON))
    alone.generate(8)
    driver.generate(8)
    for key in free:
        assert driver.tracks[key].emitted == alone.tracks[key].emitted
        assert driver.tracks[key].logprobs == pytest.approx(alone.tracks[key].logprobs, abs=1e-5)


def test_logprobs_are_those_of_the_unconstrained_model(path: str, driver: Driver) -> None:
    track = driver.admit(1, PROMPT, draw(REGEX, 5, logprobs=True))
    finish(driver)
    want = Oracle(path).logprobs(PROMPT + track.emitted)
    expected = [float(want[len(PROMPT) + at - 1, token]) for at, token in enumerate(track.emitted)]
    assert track.logprobs == pytest.approx(expected, abs=1e-5)


def test_all_choices_of_the_first_position_are_constrained(driver: Driver) -> None:
    track = driver.admit(1, PROMPT, draw(grammar.choice(["ax", "by", "cz"], "choice")), choices=30)
    finish(driver)
    assert set(track.choices[0]) == {*b"abc"}
    assert text(track) in ("ax", "by", "cz"), "the request goes on with the first of them"


def test_min_tokens_holds_as_long_as_the_grammar_goes_on(driver: Driver) -> None:
    driver.admit(1, PROMPT, draw(grammar.from_regex("a{1,9}", "regex"), min_tokens=7, logit_bias={EOS: 100.0}))
    driver.admit(2, PROMPT, draw(grammar.from_regex("a{1,3}", "regex"), min_tokens=7, logit_bias={EOS: 100.0}))
    finish(driver)
    assert text(driver.tracks[1]) == "a" * 7
    assert text(driver.tracks[2]) == "aaa"


def test_ignore_eos_ends_only_where_nothing_else_may_follow(driver: Driver) -> None:
    driver.admit(1, PROMPT, draw(grammar.from_regex("b{1,9}", "regex"), ignore_eos=True, logit_bias={EOS: 100.0}))
    finish(driver)
    assert text(driver.tracks[1]) == "b" * 9


def test_the_clients_own_stop_tokens_are_tokens_of_the_grammar_too(driver: Driver) -> None:
    stops = (EOS, ord("b"))
    sampling = draw(grammar.from_regex("[ab]{4}", "regex"), stop_token_ids=stops, min_tokens=3, temperature=0.0)
    track = driver.admit(1, PROMPT, sampling)
    driver.generate(5)
    assert bytes(track.emitted[:2]) == b"aa", "no stop token before min_tokens"
    assert track.emitted[4] == EOS


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_request_that_cannot_go_on_fails_alone(driver: Driver) -> None:
    driver.admit(1, [*PROMPT, *b"ab"], draw(REGEX), prompt_len=len(PROMPT))
    driver.admit(2, [*PROMPT, *b"xy"], draw(REGEX), prompt_len=len(PROMPT))  # was never in the language
    driver.admit(3, PROMPT, draw('start: "a" | ('))
    driver.admit(4, PROMPT, SamplingParams(temperature=0.0))
    done = driver.step({key: len(driver.tracks[key].tokens) for key in (1, 2, 3, 4)})
    reasons = {row.index: row.reason for row in done.failed}
    assert set(reasons) == {1, 2}
    assert "doesn't satisfy the grammar" in reasons[1] and "\n<" not in reasons[1]
    assert "Expected token" in reasons[2]
    assert len(done.counts_u8) == 4 and sum(done.counts_u8) == 4
    again = driver.step(dict.fromkeys((1, 2, 3, 4), 1))  # was ordered before anybody knew
    assert {row.index for row in again.failed} == {1, 2}
    driver.release(2)
    driver.release(3)
    assert not driver.step({1: 1, 4: 1}).failed


def answers(grammars: Grammars, *texts: str) -> list[str]:
    """The problem of each, as the scheduler is told."""
    for number, constraint in enumerate(texts):
        grammars.compile(GrammarCompile(number, constraint))
    found: dict[int, str] = {}
    while len(found) < len(texts):
        found |= {done.number: done.problem for done in grammars.take_compiled()}
    return [found[number] for number in range(len(texts))]


def test_compiling_answers_for_every_grammar(grammars: Grammars) -> None:
    endless = grammar.from_json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "schema")
    long = "x" * (runner_grammar.LONGEST + 1)
    good, again, wrong, never, long = answers(grammars, REGEX, REGEX, "start: missing", endless, long)
    assert good == again == ""
    assert "missing" in wrong
    assert never == "no output matches the grammar"
    assert "characters" in long
    assert not grammars.take_compiled()


def test_a_grammar_that_is_not_kept_is_compiled_again(driver: Driver, grammars: Grammars) -> None:
    assert answers(grammars, REGEX) == [""]
    texts = [grammar.from_regex(f"a{{{n}}}", "regex") for n in range(1, runner_grammar.KEPT + 1)]
    assert not any(answers(grammars, *texts))
    driver.admit(1, PROMPT, draw(REGEX))
    finish(driver)
    assert re.fullmatch(PATTERN, text(driver.tracks[1]))


@pytest.mark.parametrize("vocab", [420, 1000])
def test_model_and_tokenizer_may_each_have_tokens_that_the_other_lacks(tmp_path: Path, vocab: int) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer.byte_level().to_str())
    tokenizer.add_special_tokens(["<|added|>"])  # 420
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    grammars = Grammars(tmp_path, vocab, [tiny_tokenizer.EOS])
    path = tiny_model(tmp_path / "models", "llama", vocab_size=vocab)
    driver = Driver(path, grammars=grammars)
    for seed in range(4):
        driver.admit(seed, [5, 6, 7], draw(grammar.from_regex("(The |quick ){2}fox", "regex"), seed))
    assert not any(step.failed for step in finish(driver))
    spoken = tiny_tokenizer.byte_level()
    for track in driver.tracks.values():
        assert re.fullmatch("(The |quick ){2}fox", spoken.decode(track.emitted))
    assert "unknown special token" in answers(grammars, "start: <|no_such_token|>")[0]
    grammars.close()


def test_a_tokenizer_with_bytes_as_a_fallback_is_understood(tmp_path: Path) -> None:
    tiny_tokenizer.write(tmp_path, tiny_tokenizer.byte_fallback)
    grammars = Grammars(tmp_path, 434, [tiny_tokenizer.EOS])
    driver = Driver(tiny_model(tmp_path / "models", "llama", vocab_size=434), grammars=grammars)
    driver.admit(1, [5, 6, 7], draw(grammar.choice([" hé 世"], "choice")))
    finish(driver)
    assert tiny_tokenizer.byte_fallback().decode(driver.tracks[1].emitted).strip() == "hé 世"
    grammars.close()


def test_a_model_that_cannot_be_constrained_says_why(tmp_path: Path) -> None:
    tiny_tokenizer.write(tmp_path / "other", tiny_tokenizer.metaspace)
    for folder, eos, why in [
        (tmp_path / "other", [1], "tokenizer is not supported"),
        (tmp_path, [1], "no tokenizer.json"),
        (tmp_path / "other", [], "no end-of-sequence token"),
    ]:
        grammars = Grammars(folder, 400, eos)
        assert why in answers(grammars, REGEX)[0]
        grammars.close()


def test_only_rows_that_sample_are_masked(driver: Driver) -> None:
    """A prompt in chunks: the grammar begins with the first token after it."""
    prompt = np.random.default_rng(1).integers(2, 256, 40).tolist()
    track = driver.admit(1, prompt, draw(REGEX))
    driver.step({1: 16})
    driver.step({1: 16})
    assert not track.emitted
    finish(driver)
    assert re.fullmatch(PATTERN, text(track))


def test_closing_while_grammars_wait_to_be_compiled_is_no_error(path: str, caplog: pytest.LogCaptureFixture) -> None:
    made = Grammars(path, 256, [EOS])
    for number in range(50):
        made.compile(GrammarCompile(number, REGEX + "\n" * number))
    made.close()
    assert not caplog.records
