"""Whole clusters over real processes and sockets, held against transformers in float32 and against `unified`."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_kit import Deployment, Hold, ask, block_bytes, check_logprobs, deploy, prompt, tokens_of
from plane_kit import PLANES, settings

from tests.replay import metrics

pytestmark = pytest.mark.process

PAGE, CHUNK = 16, 64
BLOCK_BYTES = block_bytes(PAGE)
COMMON = ("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK))
RUNNING = 'pd_requests{state="running"}'
EVERY_LOGPROB: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}


PAIR = (*COMMON, "--local-prefill", "never", "--max-total-tokens")


@pytest.fixture(scope="module", params=["direct", *(pytest.param(name, marks=pytest.mark.slow) for name in PLANES)])
def plane(request: pytest.FixtureRequest) -> str:
    """What moves the KV blocks."""
    name: str = request.param
    return name


def pair_of(folder: Path, arch: str, tokens: int, plane: str, memory: str) -> AbstractContextManager[Deployment]:
    """`memory` is how `direct` moves them."""
    arguments, environment = ("--transfer-memory", memory), None
    if plane != "direct":
        arguments, environment = settings(plane, folder)
    return deploy(folder, arch, *PAIR, str(tokens), *arguments, environment=environment)


@pytest.fixture(scope="module")
def llama(plane: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Llama, over shared memory where `direct` moves KV."""
    with pair_of(tmp_path_factory.mktemp("llama"), "llama", 16384, plane, "shm") as found:
        yield found


@pytest.fixture(scope="module")
def qwen2(plane: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Qwen2 with little memory, over TCP where `direct` moves KV."""
    with pair_of(tmp_path_factory.mktemp("qwen2"), "qwen2", 1024, plane, "tcp") as found:
        yield found


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Llama on one instance, with other steps and blocks than the pair has."""
    settings = ("--unified", "1", "--max-total-tokens", "16384")
    with deploy(tmp_path_factory.mktemp("unified"), "llama", *settings) as found:
        yield found


@pytest.fixture(params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest, plane: str) -> Deployment:
    """Either of them; `plane` is named here because it varies."""
    found: Deployment = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def _everything_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, on every instance that it used."""
    yield
    for name, deployment in request.node.funcargs.items():
        if isinstance(deployment, Deployment):
            print(f"--- {name} ---\n{deployment.running.stderr[-4000:]}")  # pytest shows it when something fails
            deployment.assert_at_rest()


# --- what transformers computes -------------------------------------------------------------------------------------


def test_tokens_and_logprobs_equal_transformers_for_a_batch_of_all_lengths(pair: Deployment) -> None:
    lengths = [1, 2, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 150, 199, 420]
    prompts = [prompt(n, 100 + n) for n in lengths]
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 9, token_ids_logprob=[5, 200], **EVERY_LOGPROB) for x in prompts])
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(pair.oracle, asked, answer, 9)
        meta = answer["meta_info"]
        for kind in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
            assert len(meta[f"input_{kind}"]) == len(asked) and len(meta[f"output_{kind}"]) == 9
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(asked), 9)
    blocks = sum(-(-n // PAGE) for n in lengths)
    assert moved["pushed"] == moved["landed"] == blocks * BLOCK_BYTES
    assert moved["p_computed"] == sum(lengths)
    assert moved["d_computed"] == 0, "nothing is ever prefilled on the decode instance"


@pytest.mark.parametrize("hit", ["prefill", "decode", "both", "none"])
def test_a_shared_prefix_is_exact_wherever_it_is_cached(pair: Deployment, hit: str) -> None:
    shared = prompt(5 * PAGE, {"prefill": 1, "decode": 2, "both": 3, "none": 4}[hit])
    pair.generate([ask(shared, 2)])
    if hit in ("prefill", "none"):
        pair.flush(pair.decode)
    if hit in ("decode", "none"):
        pair.flush(pair.prefill)
    asked = [shared + prompt(n, 77 + n) for n in (1, PAGE, 20, CHUNK + 3)]
    with pair.moved() as moved:
        # One after the other: of two at once the second would find what the first has brought.
        answers = [pair.generate([ask(x, 6, return_logprob=True, top_logprobs_num=2)])[0] for x in asked[:1]]
    check_logprobs(pair.oracle, asked[0], answers[0], 6)
    blocks = -(-len(asked[0]) // PAGE)
    on_p, on_d = hit in ("prefill", "both"), hit in ("decode", "both")
    assert moved["p_cached"] == answers[0]["meta_info"]["cached_tokens"] == (5 * PAGE if on_p else 0)
    assert moved["d_cached"] == (5 * PAGE if on_d else 0)
    assert moved["pushed"] == moved["landed"] == (blocks - 5 * on_d) * BLOCK_BYTES
    # From here on both have it.
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 6, return_logprob=True) for x in asked[1:]])
    for one, answer in zip(asked[1:], answers, strict=True):
        check_logprobs(pair.oracle, one, answer, 6)
    assert moved["p_cached"] == moved["d_cached"] == 3 * 5 * PAGE
    assert moved["pushed"] == moved["landed"] == sum(-(-len(x) // PAGE) - 5 for x in asked[1:]) * BLOCK_BYTES


@pytest.mark.parametrize("start", [0, 40, 5 * PAGE, 5 * PAGE + 7])
def test_prompt_logprobs_are_exact_although_the_prompt_is_cached_on_both_sides(pair: Deployment, start: int) -> None:
    asked = prompt(6 * PAGE, 5)
    pair.generate([ask(asked, 1 + PAGE)])  # so that the last block is full too
    with pair.moved() as moved:
        (answer,) = pair.generate([ask(asked, 5, **{**EVERY_LOGPROB, "logprob_start_len": start})])
    check_logprobs(pair.oracle, asked, answer, 5)
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(asked) - start
    # The position before the first that is asked for judges it, so it must be computed.
    assert moved["p_cached"] == max(0, start - 1) // PAGE * PAGE
    assert moved["d_cached"] == 5 * PAGE
    assert moved["pushed"] == moved["landed"] == BLOCK_BYTES


def test_retraction_changes_no_token_and_no_logprob(qwen2: Deployment) -> None:
    prompts = [prompt(60, 500 + n) for n in range(8)]
    with qwen2.moved() as moved:
        answers = qwen2.generate([ask(x, 100, return_logprob=True) for x in prompts])
    assert moved["retractions"] > 0, "the pool must be too small for all of them"
    assert moved["d_computed"] == 0, "the retracted ones are prefilled on the prefill instance again"
    for asked, answer in zip(prompts, answers, strict=True):
        check_logprobs(qwen2.oracle, asked, answer, 100)


# --- what one instance computes -------------------------------------------------------------------------------------

#: Every way to draw a token.
WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 0.7, "repetition_penalty": 1.3, "top_p": 0.95, "top_k": 50},
    {"temperature": 1.0, "logit_bias": {"17": 4.0, "200": -100.0}},
    {"temperature": 0, "repetition_penalty": 1.5},
]


def sampled(count: int, tokens: int, first: int = 900) -> list[dict[str, Any]]:
    return [ask(prompt(10 + 3 * n, first + n), tokens, seed=n, **WAYS[n % len(WAYS)]) for n in range(count)]


def test_sampling_with_a_seed_is_the_same_alone_in_a_batch_and_on_one_instance(
    llama: Deployment, unified: Deployment
) -> None:
    bodies = sampled(32, 12)
    batch = [tokens_of(answer) for answer in llama.generate(bodies)]
    assert batch == [tokens_of(answer) for answer in unified.generate(bodies)]
    for n in range(0, 32, 5):
        assert [tokens_of(answer) for answer in llama.generate([bodies[n]])] == [batch[n]]
        assert [tokens_of(answer) for answer in unified.generate([bodies[n]])] == [batch[n]]
    others = llama.generate([{**b, "sampling_params": {**b["sampling_params"], "seed": 99}} for b in bodies])
    assert sum(tokens_of(answer) != mine for answer, mine in zip(others, batch, strict=True)) >= 20


def test_sampling_with_a_seed_is_the_same_after_a_retraction(qwen2: Deployment) -> None:
    # Few tokens to choose from, so that penalties, which count from the prompt's end, decide on the next one.
    few = {str(token): 100.0 for token in range(60, 72)}
    ways = [*WAYS[:4], *({"temperature": 1.0, "frequency_penalty": 2.0, "logit_bias": few} for _ in range(4))]
    bodies = [ask(prompt(60, 700 + n), 100, seed=n, **way) for n, way in enumerate(ways)]
    with qwen2.moved() as moved:
        batch = qwen2.generate(bodies)
    assert moved["retractions"] > 0
    alone = [qwen2.generate([body])[0] for body in bodies]
    assert [tokens_of(answer) for answer in batch] == [tokens_of(answer) for answer in alone]


# --- constrained ----------------------------------------------------------------------------------------------------

EOS = 1  # of the tiny models
WORDS = r"[a-z]{3,12}( [a-z]{3,12}){2,7}\."
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
#: Every kind of grammar, with every way to draw beside it.
CONSTRAINTS: list[dict[str, Any]] = [{"regex": WORDS}, {"json_schema": SCHEMA}, {"ebnf": 'root ::= "(" root ")" | "x"'}]


def constrained(count: int, length: int, first: int) -> list[dict[str, Any]]:
    return [
        ask(prompt(length, first + n), 120, **{"seed": n, **WAYS[n % len(WAYS)], **CONSTRAINTS[n % len(CONSTRAINTS)]})
        for n in range(count)
    ]


def check_constrained(bodies: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    for body, answer in zip(bodies, answers, strict=True):
        text, reason = answer["text"], answer["meta_info"]["finish_reason"]
        if reason["type"] == "length":  # a string or parentheses that went on; the beginning fits all the same
            assert len(answer["output_ids"]) == 120 and "regex" not in body["sampling_params"]
        elif "regex" in body["sampling_params"]:
            assert re.fullmatch(WORDS, text), text
        elif "ebnf" in body["sampling_params"]:
            assert re.fullmatch(r"(\()*x(\))*", text) and text.count("(") == text.count(")"), text
        else:
            found = json.loads(text)
            assert list(found) == ["name", "n"] and len(found["name"]) <= 8 and 0 <= found["n"] <= 99
        if reason["type"] == "stop":
            assert reason["matched"] == EOS == answer["output_ids"][-1], "although end tokens are ignored"
    assert sum(answer["meta_info"]["finish_reason"]["type"] == "stop" for answer in answers) > len(answers) / 2


def test_constrained_outputs_match_and_are_the_same_on_one_instance(llama: Deployment, unified: Deployment) -> None:
    bodies = constrained(24, 33, 3000)
    answers = llama.generate(bodies)
    check_constrained(bodies, answers)
    assert [tokens_of(answer) for answer in answers] == [tokens_of(answer) for answer in unified.generate(bodies)]


def test_a_constrained_output_goes_on_at_its_place_after_a_retraction(qwen2: Deployment) -> None:
    bodies = [ask(prompt(60, 800 + n), 100, seed=n, temperature=1.0, regex="([a-f]{9}[0-9]){10}") for n in range(8)]
    with qwen2.moved() as moved:
        batch = qwen2.generate(bodies)
    assert moved["retractions"] > 0 and moved["d_computed"] == 0
    assert all(re.fullmatch("([a-f]{9}[0-9]){10}", answer["text"]) for answer in batch)
    alone = [qwen2.generate([body])[0] for body in bodies]
    assert [tokens_of(answer) for answer in batch] == [tokens_of(answer) for answer in alone]


def test_clients_of_openai_get_json_and_bad_grammars_are_400(llama: Deployment) -> None:
    json_schema = {"name": "thing", "strict": True, "schema": SCHEMA}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Go"}],
        "response_format": {"type": "json_schema", "json_schema": json_schema},
        "seed": 1,
        "max_tokens": 150,
        "stop": ["}"],
    }
    answer = httpx.post(f"{llama.url}/v1/chat/completions", json=body, timeout=90).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and answer["matched_stop"] == "}"
    assert list(json.loads(answer["message"]["content"] + "}")) == ["name", "n"]
    for fields, param in [
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"structured_outputs": {"grammar": "start: <|no_such_token|>"}}, None),  # only the tokenizer knows
        ({"regex": "(", "temperature": 0}, "regex"),
        ({"ebnf": "root ::= root"}, None),  # nothing matches
        ({"ebnf": 'root ::= "a" root', "n": 2}, None),  # what matches has no end
    ]:
        bad = httpx.post(f"{llama.url}/v1/completions", json={"prompt": "Go", **fields}, timeout=90)
        assert bad.status_code == 400 and bad.json()["error"]["param"] == param, bad.text


def test_disaggregated_logprobs_equal_unified(llama: Deployment, unified: Deployment) -> None:
    bodies = [ask(prompt(n, 40 + n), 8, **EVERY_LOGPROB) for n in (5, 70, 300)]
    for one, other in zip(llama.generate(bodies), unified.generate(bodies), strict=True):
        assert tokens_of(one) == tokens_of(other)
        for kind in ("input_token_logprobs", "output_token_logprobs"):
            pairs = zip(one["meta_info"][kind], other["meta_info"][kind], strict=True)
            assert all(a == b or abs(a - b) < 1e-4 for (a, *_), (b, *_) in pairs)


# --- the way of the tokens ------------------------------------------------------------------------------------------


def test_a_chunk_has_landed_before_the_next_one_is_computed(pair: Deployment) -> None:
    """The prefill runner stands still where it has handed over the pushes of its first step and not said so yet.

    Both figures come from one snapshot of its scheduler, so the pushed bytes are the first step's whatever happens
    later. A push is reported when it was applied at its destination.
    """
    asked, chunk = prompt(4 * CHUNK, 31), CHUNK // PAGE * BLOCK_BYTES
    before = metrics(pair.prefill)
    answers: list[dict[str, Any]] = []
    with Hold(pair, "prefill-0.runner.push") as hold:
        request = threading.Thread(target=lambda: answers.extend(pair.generate([ask(asked, 4, return_logprob=True)])))
        request.start()
        hold.wait()
        while True:
            now = metrics(pair.prefill)
            pushed, steps = (now[name] - before[name] for name in ("pd_kv_pushed_bytes_total", "pd_steps_total"))
            if pushed or steps:
                break
    request.join(60)
    assert (pushed, steps) == (chunk, 0)
    check_logprobs(pair.oracle, asked, answers[0], 4)


def with_end_tokens(deployment: Deployment, asked: list[int], most: int, bias: float) -> list[int]:
    """Greedy tokens up to and with the model's end token 1, which is `bias` more likely than the model thinks."""
    tokens = list(asked)
    while len(tokens) < len(asked) + most and tokens[len(asked) :][-1:] != [1]:
        logits = deployment.oracle.logprobs(tokens)[-1].tolist()
        logits[1] += bias
        tokens.append(logits.index(max(logits)))
    return tokens[len(asked) :]


def test_nothing_follows_the_end_token(pair: Deployment) -> None:
    """Steps run one ahead of what is known, so a token after it is computed, and dropped."""
    prompts = [prompt(20 + n, 300 + n) for n in range(24)]
    want = [with_end_tokens(pair, x, 30, 4.0) for x in prompts]
    ends = [len(tokens) for tokens in want]
    assert min(ends) == 1 and any(1 < end < 30 for end in ends), ends
    with pair.moved() as moved:
        answers = pair.generate([ask(x, 30, ignore_eos=False, logit_bias={"1": 4.0}) for x in prompts])
    for tokens, answer in zip(want, answers, strict=True):
        meta = answer["meta_info"]
        assert (tokens_of(answer), meta["completion_tokens"]) == (tokens, len(tokens))
        ended = tokens[-1] == 1
        assert meta["finish_reason"] == ({"type": "stop", "matched": 1} if ended else {"type": "length", "length": 30})
    assert moved["d_late"] > 0, "no token had to be dropped: this test tested nothing"


def test_a_stop_token_ends_the_answer_and_stays_in_it(llama: Deployment) -> None:
    asked = prompt(33, 2)
    want = llama.oracle.generate_logprobs(asked, 8).tokens
    for stop in dict.fromkeys(want):
        (answer,) = llama.generate([ask(asked, 12, stop_token_ids=[stop])])
        assert tokens_of(answer) == want[: want.index(stop) + 1]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


# --- text -----------------------------------------------------------------------------------------------------------


def as_text(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


#: Bytes that often make characters of two, three and four bytes, and often do not.
ALPHABETS = ["é", "日", "🎉", "aé日🎉"]


def garbled(alphabet: str, seed: int, count: int = 60) -> dict[str, Any]:
    """Random bytes of `alphabet`."""
    bias = {str(byte): 100.0 for byte in alphabet.encode()}
    return ask(prompt(12, seed), count, temperature=50.0, seed=seed, logit_bias=bias)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_a_character_of_several_tokens_streams_whole(llama: Deployment, alphabet: str) -> None:
    bodies = [garbled(alphabet, seed) for seed in range(8)]
    whole = llama.generate(bodies)
    characters = split_between_instances = 0
    for body, answer in zip(bodies, whole, strict=True):
        ids = tokens_of(answer)
        text = as_text(ids)
        assert answer["text"] == text
        for event in llama.stream("/generate", body):
            assert text.startswith(event["text"]), "nothing is ever taken back"
        assert event["text"] == text and event["output_ids"] == ids
        characters += sum(ord(character) > 127 and character != "\ufffd" for character in text)
        split_between_instances += ids[0] > 0xBF and text[0] != "\ufffd"
    assert characters > 0
    assert split_between_instances > 0 or alphabet != "é", "no character began on one side and ended on the other"


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """The same question in OpenAI's words."""
    sampling = dict(body["sampling_params"])
    return {"prompt": body["input_ids"], "max_tokens": sampling.pop("max_new_tokens"), **sampling}


def test_streamed_and_whole_completions_are_the_same(pair: Deployment) -> None:
    for body in (completion(garbled("aé日🎉", 77)), completion(ask(prompt(90, 14), 25))):
        whole = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).json()
        events = pair.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
        deltas = [choice["text"] for event in events for choice in event["choices"]]
        assert "".join(deltas) == whole["choices"][0]["text"]
        for usage in (events[-1]["usage"], whole["usage"]):
            assert usage["completion_tokens"] == body["max_tokens"]
            assert usage["total_tokens"] == body["max_tokens"] + len(body["prompt"])


def test_a_scored_prompt_has_the_logprobs_of_transformers_and_no_output(pair: Deployment) -> None:
    asked = prompt(150, 31)
    body = {"prompt": asked, "echo": True, "logprobs": 2, "max_tokens": 0, "prompt_logprobs": 1}
    body["return_tokens_as_token_ids"] = True  # the text of half a character names many
    answer = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).json()
    [choice] = answer["choices"]
    want = pair.oracle.generate_logprobs(asked, 1).logprobs
    assert answer["usage"]["completion_tokens"] == 0 and choice["finish_reason"] == "length"
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == len(asked) and found[0] is None and choice["prompt_logprobs"][0] is None
    for at in range(1, len(asked)):
        exact = float(want[at - 1][asked[at]])
        assert abs(found[at] - exact) < 1e-5
        assert abs(choice["prompt_logprobs"][at][str(asked[at])]["logprob"] - exact) < 1e-5
        assert len(choice["logprobs"]["top_logprobs"][at]) in (2, 3)


#: Options of sampling, all with a seed, and what holds for the token ids of any answer.
SAMPLED: dict[str, tuple[dict[str, Any], Callable[[list[int]], bool]]] = {
    "logit_bias": ({"logit_bias": {"65": 100}}, lambda ids: ids == [65] * 12),
    "presence_penalty": ({"presence_penalty": 1.9}, lambda ids: len(ids) == 12),
    "frequency_penalty": ({"frequency_penalty": 1.9}, lambda ids: len(ids) == 12),
    "repetition_penalty": ({"repetition_penalty": 1.4}, lambda ids: len(ids) == 12),
    "top_k": ({"top_k": 3}, lambda ids: len(ids) == 12),
    "top_p": ({"top_p": 0.5}, lambda ids: len(ids) == 12),
    "min_p": ({"min_p": 0.2}, lambda ids: len(ids) == 12),
    "min_tokens": (
        {"min_tokens": 5, "ignore_eos": False, "logit_bias": {"1": 100}},
        lambda ids: len(ids) == 6 and ids.index(1) == 5,
    ),
    "stop_token_ids": ({"stop_token_ids": [66], "logit_bias": {"66": 100}}, lambda ids: ids == [66]),
}


@pytest.mark.parametrize("option", SAMPLED)
def test_every_option_of_sampling_acts_and_gives_the_same_on_one_instance_and_on_two(
    llama: Deployment, unified: Deployment, option: str
) -> None:
    fields, holds = SAMPLED[option]
    body = {
        "prompt": prompt(40, 3),
        "max_tokens": 12,
        "seed": 5,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    answers = [
        httpx.post(f"{at.url}/v1/completions", json={**body, "user": "me"}, timeout=60).json()["choices"][0]
        for at in (llama, unified)
    ]
    assert answers[0] == answers[1]
    assert holds(answers[0]["token_ids"]), answers[0]["token_ids"]


def test_a_chat_streams_what_it_answers_as_a_whole(llama: Deployment) -> None:
    sampling = garbled("é日", 5)["sampling_params"]
    body = {
        "messages": [{"role": "user", "content": "naïve 日本語?"}],
        "max_tokens": sampling.pop("max_new_tokens"),
        "logprobs": True,
        **sampling,
    }
    whole = httpx.post(f"{llama.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    events = llama.stream("/v1/chat/completions", body)
    deltas = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    raw = bytes(byte for token in whole["logprobs"]["content"] for byte in token["bytes"])
    assert "".join(deltas) == whole["message"]["content"] == raw.decode(errors="replace")
    assert any(ord(character) > 127 and character != "\ufffd" for character in whole["message"]["content"])


def test_a_stop_string_across_tokens_never_leaks(llama: Deployment) -> None:
    source = random.Random(8)
    for seed in range(6):
        body = garbled("aé日", seed, 40)
        (answer,) = llama.generate([body])
        whole = answer["text"]
        for length in (1, 2, 3, 5):
            at = source.randrange(len(whole) - length)
            stops = [whole[at : at + length], "never there"]
            want = whole[: whole.index(stops[0])]
            stopping = {**body, "sampling_params": {**body["sampling_params"], "stop": stops}}
            events = llama.stream("/generate", stopping)
            assert all(want.startswith(event["text"]) for event in events)
            assert events[-1]["text"] == want
            assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stops[0]}
            deltas = [
                choice for event in llama.stream("/v1/completions", completion(stopping)) for choice in event["choices"]
            ]
            assert "".join(choice["text"] for choice in deltas) == want
            assert deltas[-1]["finish_reason"] == "stop"


# --- several choices ------------------------------------------------------------------------------------------------


def choices_of(answer: Any) -> list[list[int]]:
    """What /generate with n > 1 answers is a list."""
    return [tokens_of(choice) for choice in answer]


def test_choices_with_a_seed_are_the_same_alone_in_a_batch_and_on_one_instance(
    llama: Deployment, unified: Deployment
) -> None:
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, CHUNK, 3 * CHUNK + 5]
    bodies = [ask(prompt(n, 40 + n), 20, seed=n, n=3, **WAYS[at % len(WAYS)]) for at, n in enumerate(lengths)]
    batch = [choices_of(answer) for answer in llama.generate(bodies)]
    assert batch == [choices_of(answer) for answer in unified.generate(bodies)]
    for body, found in zip(bodies, batch, strict=True):
        assert [choices_of(answer) for answer in llama.generate([body])] == [found]
        one = {**body, "sampling_params": {**body["sampling_params"], "n": 1}}
        assert tokens_of(llama.generate([one])[0]) == found[0], "the first of three is the only one of one"
        assert len({tuple(tokens) for tokens in found}) == 3


def test_greedy_choices_are_equal_and_their_logprobs_those_of_transformers(pair: Deployment) -> None:
    asked = prompt(2 * PAGE + 5, 61)
    with pair.moved() as moved:
        (answer,) = pair.generate([ask(asked, 24, n=3, **EVERY_LOGPROB)])
    for choice in answer:
        check_logprobs(pair.oracle, asked, choice, 24)
    assert len(choices_of(answer)) == 3
    assert moved["pushed"] == moved["landed"] == 3 * BLOCK_BYTES
    assert (moved["p_computed"], moved["d_computed"]) == (len(asked), 0)


def test_a_prompt_is_pushed_once_whatever_the_number_of_its_choices(llama: Deployment) -> None:
    found = []
    for n in (1, 4):
        with llama.moved() as moved:
            llama.generate([ask(prompt(CHUNK + 7, 70 + n), 12, n=n, temperature=1.0)])
        found.append({name: moved[name] for name in ("pushed", "landed", "p_computed", "p_steps", "d_computed")})
    assert found[0] == found[1] and found[0]["pushed"] == -(-(CHUNK + 7) // PAGE) * BLOCK_BYTES


def test_choices_are_the_same_after_a_retraction(qwen2: Deployment) -> None:
    bodies = [ask(prompt(60, 800 + n), 100, seed=n, n=4, **WAYS[n]) for n in range(3)]
    with qwen2.moved() as moved:
        batch = [choices_of(answer) for answer in qwen2.generate(bodies)]
    assert moved["retractions"] > 0
    for body, found in zip(bodies, batch, strict=True):
        one = {**body, "sampling_params": {**body["sampling_params"], "n": 1}}
        assert [tokens_of(answer) for answer in qwen2.generate([one])] == [found[0]]
        assert choices_of(qwen2.generate([body])[0]) == found


def test_a_stop_string_ends_one_choice_and_the_others_go_on(llama: Deployment) -> None:
    body = garbled("aé日", 31, 40)
    body["sampling_params"]["n"] = 3
    (whole,) = llama.generate([body])
    stop = next(
        text for at in range(30) if sum((text := whole[1]["text"][at : at + 3]) in w["text"] for w in whole) == 1
    )
    stopping = {**body, "sampling_params": {**body["sampling_params"], "stop": [stop]}}
    (answer,) = llama.generate([stopping])
    assert [choice["text"] for choice in answer] == [
        whole[0]["text"],
        whole[1]["text"][: whole[1]["text"].index(stop)],
        whole[2]["text"],
    ]
    last = {event["index"]: event["text"] for event in llama.stream("/generate", stopping)}
    assert [last[index] for index in range(3)] == [choice["text"] for choice in answer]


_TOOL = {"type": "function", "function": {"name": "go", "parameters": {"properties": {"to": {"enum": ["ab", "cd"]}}}}}
_CHAT = {"messages": [{"role": "user", "content": "Go"}]}
#: Options that meet in one answer.
TOGETHER: list[dict[str, Any]] = [
    {"prompt": "abc", "echo": True, "logprobs": 2, "stop": ["e", "q"], "max_tokens": 20},
    {"prompt": ["abc", "d"], "echo": True, "logprobs": 1, "max_tokens": 0},
    {"prompt": ["abc", "d"], "echo": True, "logprobs": 0, "regex": "[a-f]{3}( [g-m]{4}){2}", "presence_penalty": 1},
    {"prompt": "abc", "ignore_eos": True, "min_tokens": 9, "return_tokens_as_token_ids": True, "logprobs": 1},
    {**_CHAT, "tools": [_TOOL], "tool_choice": "required", "parallel_tool_calls": False, "logprobs": True},
    {**_CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "max_tokens": 60},
]


def joined(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By index what the chunks of a stream come to."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        one = found.setdefault(choice["index"], {"text": "", "arguments": "", "ids": [], "logprobs": 0, "end": None})
        delta = choice.get("delta", {})
        one["text"] += choice.get("text") or delta.get("content") or ""
        one["arguments"] += "".join(call["function"]["arguments"] for call in delta.get("tool_calls", ()))
        one["ids"] += choice.get("token_ids", [])
        logprobs = choice["logprobs"] or {"content": []}
        one["logprobs"] += len(logprobs.get("content", logprobs.get("tokens")))
        assert one["end"] is None, "nothing follows the end"
        one["end"] = choice["finish_reason"]
    return found


def as_chunks(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole answer as a stream of one chunk for each choice."""
    return [{"choices": [{**choice, "delta": choice.get("message", {})} for choice in answer["choices"]]}]


@pytest.mark.parametrize("body", TOGETHER, ids=range(len(TOGETHER)))
def test_options_that_meet_give_the_same_streamed_and_whole_on_one_instance_and_on_two(
    llama: Deployment, unified: Deployment, body: dict[str, Any]
) -> None:
    asked = {"n": 2, "seed": 3, "temperature": 1.2, "return_token_ids": True, "max_tokens": 40, **body}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    found = []
    for at in (llama, unified):
        answer = httpx.post(f"{at.url}{path}", json=asked, timeout=60).json()
        found.append((joined(as_chunks(answer)), answer["usage"]["completion_tokens"]))
        events = at.stream(path, {**asked, "stream_options": {"include_usage": True}})
        found.append((joined(events), events[-1]["usage"]["completion_tokens"]))
    assert all(one == found[0] for one in found), found
    choices, count = found[0]
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert sorted(choices) == [*range(2 * prompts)] and all(choice["end"] for choice in choices.values())
    assert count == sum(len(choice["ids"]) for choice in choices.values())
    if "tools" in body:
        assert all(choice["end"] == "tool_calls" for choice in choices.values())
        assert all(json.loads(choice["arguments"]).get("to", "ab") in ("ab", "cd") for choice in choices.values())


def test_best_of_gives_the_candidates_with_the_highest_mean_logprob(llama: Deployment) -> None:
    body = completion(ask(prompt(21, 9), 12, temperature=1.5, seed=4))
    found = httpx.post(f"{llama.url}/v1/completions", json={**body, "n": 5, "logprobs": 0}, timeout=60).json()
    best = httpx.post(f"{llama.url}/v1/completions", json={**body, "n": 2, "best_of": 5}, timeout=60).json()
    means = [sum(c["logprobs"]["token_logprobs"]) / 12 for c in found["choices"]]
    order = sorted(range(5), key=means.__getitem__, reverse=True)
    assert [c["text"] for c in best["choices"]] == [found["choices"][at]["text"] for at in order[:2]]
    for usage in (found["usage"], best["usage"]):
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (21, 5 * 12)


# --- ends -----------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_cancels_everywhere(llama: Deployment) -> None:
    body = {"prompt": prompt(60, 3), "max_tokens": 900, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{llama.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        while metrics(llama.decode)[RUNNING] == 0:
            next(lines)
    end = time.monotonic() + 5
    while metrics(llama.decode)[RUNNING] and time.monotonic() < end:
        time.sleep(0.05)
    assert metrics(llama.decode)[RUNNING] == 0


def test_a_request_that_names_no_prefill_is_503_under_never(llama: Deployment) -> None:
    body = {"prompt": prompt(30, 8), "max_tokens": 4}
    response = httpx.post(f"{llama.decode}/v1/completions", json=body, timeout=30)
    assert response.status_code == 503
    assert "prefill" in response.json()["error"]["message"]


# --- operations -----------------------------------------------------------------------------------------------------


def test_every_instance_generates_a_token_for_a_health_check(llama: Deployment, unified: Deployment) -> None:
    steps = [metrics(url)["pd_steps_total"] for url in (llama.prefill, llama.decode, unified.decode)]
    for url in (llama.prefill, llama.decode, unified.decode, llama.url):
        assert httpx.get(f"{url}/health_generate", timeout=30).status_code == 200, url
    after = [metrics(url)["pd_steps_total"] for url in (llama.prefill, llama.decode, unified.decode)]
    assert all(later > earlier for earlier, later in zip(steps, after, strict=True))


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_paused_cluster_stands_still_and_goes_on_with_the_same_tokens(llama: Deployment, mode: str) -> None:
    body = ask(prompt(80, 21), 120)
    (want,) = llama.generate([body])
    with httpx.stream("POST", f"{llama.url}/generate", json={**body, "stream": True}, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        for _ in range(5):
            next(lines)
        paused = httpx.post(f"{llama.url}/pause_generation", json={"mode": mode}, timeout=30).json()
        assert paused["success"] and paused["aborted"] == 0
        time.sleep(0.2)
        steps = metrics(llama.decode)["pd_steps_total"]
        time.sleep(0.3)
        assert metrics(llama.decode)["pd_steps_total"] == steps
        assert httpx.get(f"{llama.decode}/server_info", timeout=30).json()["paused"] is True
        assert httpx.get(f"{llama.decode}/health_generate", timeout=30).status_code == 503
        assert httpx.post(f"{llama.url}/continue_generation", json={}, timeout=30).json()["success"]
        last = [json.loads(line.removeprefix("data: ")) for line in lines][-1]
    assert last["output_ids"] == want["output_ids"]


@pytest.mark.parametrize("how", ["/abort_request", "/pause_generation"])
def test_an_abort_ends_a_stream_on_the_decode_instance_by_the_router(llama: Deployment, how: str) -> None:
    body = {"prompt": prompt(60, 3), "max_tokens": 900, "ignore_eos": True, "stream": True, "rid": "to-be-aborted"}
    wish = {"rid": "to-be-aborted"} if how == "/abort_request" else {"mode": "abort"}
    with httpx.stream("POST", f"{llama.url}/v1/completions", json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        for _ in range(3):
            next(lines)
        assert httpx.post(f"{llama.url}{how}", json=wish, timeout=30).json()["aborted"] == 1
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"
    httpx.post(f"{llama.url}/continue_generation", timeout=30).raise_for_status()


def test_the_load_of_every_instance_is_in_the_routers(llama: Deployment) -> None:
    body = httpx.get(f"{llama.url}/v1/loads", timeout=30).json()
    assert {entry["worker"] for entry in body["loads"]} == {llama.prefill, llama.decode}
    assert all(entry["num_used_tokens"] == 0 and entry["max_total_num_tokens"] > 0 for entry in body["loads"])
    assert len(httpx.get(f"{llama.url}/get_load", timeout=30).json()) == 2
