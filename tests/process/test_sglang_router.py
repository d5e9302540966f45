"""SGLang's router and its mini load balancer, unchanged, drive two prefill and two decode instances."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from cluster_kit import COMPUTED, LANDED, ask, check_logprobs, prompt
from fault_kit import Cluster, eventually, fault_cluster, send
from foreign_kit import PATIENCE, sglang_router, with_room

from tests.oracle import Oracle
from tests.replay import metrics

pytestmark = pytest.mark.process

#: So long a leg waits for the decode instance that asks for it.
BOOTSTRAP = 3.0
EVERY_LOGPROB: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with fault_cluster(tmp_path_factory.mktemp("cluster"), "--bootstrap-timeout", str(BOOTSTRAP)) as found:
        yield found


@pytest.fixture(scope="module")
def oracle(cluster: Cluster) -> Oracle:
    return Oracle(cluster.info("decode-0")["model_path"])


@pytest.fixture(scope="module")
def rust(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sglang_router(cluster, tmp_path_factory.mktemp("rust")) as url:
        yield url


@pytest.fixture(scope="module")
def mini(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sglang_router(cluster, tmp_path_factory.mktemp("mini"), "--mini-lb") as url:
        yield url


@pytest.fixture(params=["rust", "mini"])
def router(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(autouse=True)
def _everything_is_given_back(cluster: Cluster) -> Iterator[None]:
    """After every test, on all four: no block is held, no request waits, no leg, and no first token for one."""
    yield
    print(cluster.command.stderr[-4000:])  # pytest shows it when something fails
    eventually(lambda: at_rest(cluster), 10.0, lambda: [(name, cluster.books(name)) for name in cluster.names])


def at_rest(cluster: Cluster) -> bool:
    for name in cluster.names:
        books = cluster.books(name)
        if not (cluster.clean(name) and books["idle"] and not books.get("rooms")):
            return False
    return True


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{url}{path}", json=body, timeout=PATIENCE)
    assert response.status_code == 200, response.text
    return response.json()


def stream(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{url}{path}", json={**body, "stream": True}, timeout=PATIENCE) as response:
        assert response.status_code == 200, response.read()
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def text_of(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


# --- what it forwards -----------------------------------------------------------------------------------------------


def test_generate_with_logprobs_merged_once_equals_transformers(router: str, oracle: Oracle) -> None:
    for length in (1, 40, 150):
        asked = prompt(length, length)
        answer = post(router, "/generate", ask(asked, 6, top_logprobs_num=2, **EVERY_LOGPROB))
        assert len(answer["meta_info"]["input_token_logprobs"]) == length
        answer["meta_info"].pop("input_top_logprobs")  # neither router merges these
        check_logprobs(oracle, asked, answer, 6)
    plain = post(router, "/generate", ask(asked, 6))
    assert plain["output_ids"] == answer["output_ids"] and "input_token_logprobs" not in plain["meta_info"]


def test_generate_streams_what_it_answers_as_a_whole(router: str, mini: str) -> None:
    body = ask(prompt(50, 3), 8)
    whole = post(router, "/generate", body)
    events = stream(router, "/generate", body)
    assert [len(event["output_ids"]) for event in events] == sorted(len(e["output_ids"]) for e in events)
    assert (events[-1]["text"], events[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    last = stream(router, "/generate", {**body, **EVERY_LOGPROB})[-1]
    exact = post(router, "/generate", {**body, **EVERY_LOGPROB})["meta_info"]
    merged = [[] if value is None else value for value in last["meta_info"]["input_token_logprobs"]]
    # The router cannot merge into a stream: it expects JSON of the prefill leg, whose answer is a stream as well.
    assert len(merged) == (50 if router == mini else 0)
    outputs = zip(last["meta_info"]["output_token_logprobs"], exact["output_token_logprobs"], strict=True)
    assert all(abs(one - other) < 1e-4 for (one, *_), (other, *_) in outputs)


def test_lists_of_prompts_are_joined_prompt_by_prompt(rust: str, mini: str, oracle: Oracle) -> None:
    lists = [prompt(n, n) for n in (3, 33, 70)]
    body = {**ask([], 5), "input_ids": lists}
    for url in (rust, mini):
        answers = post(url, "/generate", body)
        assert [a["output_ids"] for a in answers] == [oracle.generate_logprobs(x, 5).tokens for x in lists]
    texts = ["one", "and two"]
    body = {**ask([], 5), "text": texts}
    del body["input_ids"]
    answers = post(mini, "/generate", body)
    want = [oracle.generate_logprobs(list(text.encode()), 5).tokens for text in texts]
    assert [answer["output_ids"] for answer in answers] == want
    assert {event["index"] for event in stream(mini, "/generate", body)} == {0, 1}


def test_completions(router: str, oracle: Oracle) -> None:
    more = {"model": "default", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    texts = ["The first.", "The second, longer one."]
    want = [text_of(oracle.generate_logprobs(list(text.encode()), 5).tokens) for text in texts]
    for asked, texts_wanted in ((texts[0], want[:1]), (texts, want)):
        body = {"prompt": asked, **more}
        assert [c["text"] for c in post(router, "/v1/completions", body)["choices"]] == texts_wanted
        streamed: dict[int, str] = {}
        for event in stream(router, "/v1/completions", body):
            for choice in event["choices"]:
                streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
        assert [streamed[index] for index in sorted(streamed)] == texts_wanted
    logprobs = post(router, "/v1/completions", {"prompt": texts[0], "logprobs": 2, **more})["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 5


def test_chat(router: str, cluster: Cluster) -> None:
    body = {
        "model": cluster.info("decode-0")["model"],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    (choice,) = post(router, "/v1/chat/completions", body)["choices"]
    (direct,) = post(cluster.urls["decode-1"], "/v1/chat/completions", body)["choices"]
    assert choice["message"] == direct["message"]
    assert len(choice["logprobs"]["content"]) == len(direct["logprobs"]["content"])
    events = stream(router, "/v1/chat/completions", body)
    deltas = [c["delta"].get("content") or "" for event in events for c in event["choices"]]
    assert "".join(deltas) == choice["message"]["content"]


def test_many_at_once_are_all_prefilled_on_the_prefill_instances(router: str, cluster: Cluster, oracle: Oracle) -> None:
    decodes = [cluster.urls["decode-0"], cluster.urls["decode-1"]]
    before = [metrics(url) for url in decodes]
    prompts = [prompt(5 + 3 * n, 200 + n) for n in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda asked: post(router, "/generate", ask(asked, 6)), prompts))
    for asked, answer in zip(prompts, answers, strict=True):
        assert answer["output_ids"] == oracle.generate_logprobs(asked, 6).tokens
    moved = [
        {name: after[name] - old[name] for name in (COMPUTED, LANDED)}
        for old, after in zip(before, [metrics(url) for url in decodes], strict=True)
    ]
    assert sum(figures[LANDED] for figures in moved) > 0
    assert [figures[COMPUTED] for figures in moved] == [0, 0]


def test_what_the_routers_ask_of_their_workers_besides(rust: str, mini: str, cluster: Cluster) -> None:
    model = cluster.info("decode-0")["model"]
    workers = httpx.get(f"{rust}/workers", timeout=PATIENCE).json()["workers"]
    assert sorted((w["worker_type"], w["is_healthy"], w["model_id"]) for w in workers) == [
        (kind, True, model) for kind in ("decode", "decode", "prefill", "prefill")
    ]
    for url in (rust, mini):
        assert httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"][0]["id"] == model
        assert httpx.get(f"{url}/get_model_info", timeout=PATIENCE).json()["tokenizer_path"] == model
        assert httpx.post(f"{url}/flush_cache", timeout=PATIENCE).status_code == 200
    found = httpx.get(f"{mini}/get_server_info", timeout=PATIENCE).json()
    assert {info["disaggregation_mode"] for info in found["prefill"]} == {"prefill"}
    assert all(info["max_running_requests"] > 0 and info["tokenizer_path"] == model for info in found["decode"])


# --- ends -----------------------------------------------------------------------------------------------------------


def aborted(cluster: Cluster) -> int:
    """Requests on decode instances whose client left."""
    lines = cluster.command.logged("request_finished")
    return sum(line["status"] == 499 and line["instance"].startswith("decode") for line in lines)


@pytest.mark.parametrize(
    ("router", "when"),
    [("rust", "streaming"), ("rust", "decoding"), ("rust", "prefilling"), ("mini", "streaming")],
    indirect=["router"],
)
def test_a_client_that_leaves_frees_everything_on_both_sides(router: str, cluster: Cluster, when: str) -> None:
    """Whether everything is free is looked at after every test. Mini-lb sees only who leaves a stream."""
    before = aborted(cluster)
    body = {**ask(prompt(60, 9), 900), "stream": when == "streaming"}
    points = ("prefill-0.runner.step", "prefill-1.runner.step") if when == "prefilling" else ()
    cluster.faults.arm(*points)
    patience = httpx.Timeout(10.0, read=10.0 if when == "streaming" else 0.1)
    with suppress(httpx.ReadTimeout), httpx.stream("POST", f"{router}/generate", json=body, timeout=patience) as answer:
        assert when == "streaming"
        next(answer.iter_lines())
    eventually(lambda: aborted(cluster) > before, 10.0)
    cluster.faults.release(*points)


def test_a_leg_is_answered_alike_by_both_endpoints_of_openai_and_streamed_in_one_event(cluster: Cluster) -> None:
    prefill, decode = cluster.urls["prefill-0"], cluster.urls["decode-0"]
    for room, path, fields in (
        (11, "/v1/completions", {"prompt": "Once upon a time"}),
        (12, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        (13, "/generate", {"text": "Once upon a time", **EVERY_LOGPROB}),
    ):
        limit = (
            {"sampling_params": {"max_new_tokens": 6, "ignore_eos": True}} if path == "/generate" else {"max_tokens": 6}
        )
        body = with_room(cluster, {**fields, **limit, "ignore_eos": True}, room)
        with ThreadPoolExecutor(2) as pool:
            leg = pool.submit(post, prefill, path, body)
            whole = pool.submit(post, decode, path, body)
            if path == "/generate":
                one, all_of_it = leg.result(), whole.result()
                assert one["output_ids"] == all_of_it["output_ids"][:1]
                assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
                assert len(one["meta_info"]["input_token_logprobs"]) == one["meta_info"]["prompt_tokens"]
                assert all_of_it["meta_info"]["input_token_logprobs"] == []
            else:
                assert leg.result()["choices"][0]["finish_reason"] == "length"
                assert leg.result()["usage"]["completion_tokens"] == 1
                assert whole.result()["usage"]["completion_tokens"] == 6
        body["bootstrap_room"] = room + 100
        with ThreadPoolExecutor(2) as pool:
            events = pool.submit(stream, prefill, path, body)
            pool.submit(stream, decode, path, body).result()
            finished = [e for e in events.result() if path == "/generate" or e["choices"][0]["finish_reason"]]
            assert len(finished) == 1


def test_a_scalar_room_numbers_the_prompts_of_a_batch(cluster: Cluster) -> None:
    body = with_room(cluster, {**ask([], 4), "input_ids": [prompt(n, n) for n in (9, 30, 41)]}, 1000)
    with ThreadPoolExecutor(2) as pool:
        leg = pool.submit(post, cluster.urls["prefill-0"], "/generate", body)
        whole = pool.submit(post, cluster.urls["decode-1"], "/generate", body)
        assert [a["output_ids"] for a in leg.result()] == [a["output_ids"][:1] for a in whole.result()]


def test_a_leg_that_nobody_asks_for_fails_within_the_bootstrap_timeout(cluster: Cluster) -> None:
    began = time.monotonic()
    body = with_room(cluster, ask(prompt(9), 4), 77)
    response = httpx.post(f"{cluster.urls['prefill-0']}/generate", json=body, timeout=PATIENCE)
    assert response.status_code == 504 and BOOTSTRAP <= time.monotonic() - began < BOOTSTRAP + 1.5
    assert "bootstrap_room" in response.json()["error"]["message"]


def test_rooms_used_twice_in_one_request_are_a_clear_error(cluster: Cluster) -> None:
    body = with_room(cluster, {**ask([], 4), "input_ids": [prompt(9), prompt(10)]}, [5, 5])
    response = httpx.post(f"{cluster.urls['prefill-0']}/generate", json=body, timeout=PATIENCE)
    assert response.status_code == 409 and "bootstrap_room 5" in response.json()["error"]["message"]


def test_without_a_room_a_prefill_instance_says_where_to_go(cluster: Cluster) -> None:
    response = httpx.post(f"{cluster.urls['prefill-0']}/generate", json=ask(prompt(9), 4), timeout=PATIENCE)
    assert response.status_code == 400 and "decode instance or the router" in response.json()["error"]["message"]


def test_a_leg_fails_at_once_when_its_decode_instance_is_killed(cluster: Cluster) -> None:
    body = with_room(cluster, ask(prompt(70, 4), 8), 88)
    answers: list[httpx.Response] = []

    def ask_decode() -> None:
        try:
            httpx.post(f"{cluster.urls['decode-0']}/generate", json=body, timeout=PATIENCE)
        except httpx.TransportError:
            pass

    leg = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{cluster.urls['prefill-0']}/generate", json=body, timeout=PATIENCE))
    )
    cluster.faults.arm("prefill-0.runner.step")
    other = threading.Thread(target=ask_decode)
    leg.start()
    other.start()
    cluster.faults.wait(("prefill-0.runner.step",), 10.0)
    send(cluster.victim("decode-0"), signal.SIGKILL)
    began = time.monotonic()
    leg.join(PATIENCE)
    took = time.monotonic() - began
    cluster.faults.release("prefill-0.runner.step")
    other.join(PATIENCE)
    assert answers[0].status_code == 503 and "decode instance was lost" in answers[0].json()["error"]["message"]
    assert took < 1.0, "nobody waits for the bootstrap timeout"
    cluster.wait_until_healthy()


def test_several_choices_are_one_prompt_with_one_room(rust: str, mini: str) -> None:
    """The router gives each choice of a chat a room, completions one to all; mini-lb always one."""
    chat = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "n": 2, "max_tokens": 4, "seed": 3}
    completion = {"model": "default", "prompt": "Hi", "n": 2, "max_tokens": 4, "seed": 3}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        found = [[c["index"] for c in post(url, path, body)["choices"]] for url in (rust, mini)]
        assert found == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("router", "victim"),
    [
        ("rust", "prefill-0"),
        ("rust", "decode-0"),
        pytest.param("mini", "prefill-0", marks=pytest.mark.slow),
        pytest.param("mini", "decode-0", marks=pytest.mark.slow),
    ],
    indirect=["router"],
)
def test_after_an_instance_was_killed_everything_ends_and_the_next_request_works(
    router: str, rust: str, cluster: Cluster, victim: str
) -> None:
    """The router tries again; the mini load balancer does not, so its clients see errors."""
    began, ends = time.monotonic(), list[str]()

    def one(number: int) -> None:
        body = {**ask(prompt(80 + number, number), 60), "stream": number % 2 == 0}
        try:
            response = httpx.post(f"{router}/generate", json=body, timeout=PATIENCE)
            ends.append(str(response.status_code))
        except httpx.TimeoutException:
            ends.append("timeout")
        except httpx.TransportError:
            ends.append("cut")

    clients = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for client in clients:
        client.start()
    time.sleep(0.15)
    send(cluster.victim(victim), signal.SIGKILL)
    for client in clients:
        client.join(PATIENCE)
    assert len(ends) == 16 and "timeout" not in ends, ends
    assert time.monotonic() - began < 20.0, "nobody waits for what is dead"
    if router == rust and victim == "prefill-0":
        assert set(ends) == {"200"}, "prefills are tried again, elsewhere"
    cluster.wait_until_healthy()

    def served() -> bool:
        return httpx.post(f"{router}/generate", json=ask(prompt(9), 3), timeout=PATIENCE).status_code == 200

    eventually(served, 20.0, every=0.2)
