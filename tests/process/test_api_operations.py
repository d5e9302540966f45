"""An instance's operations over real sockets: what they ask of the scheduler, and what its answers become."""

import asyncio
import re
import time

import pytest
from api_kit import encode, events, says, serving

import pd
from pd.api.context import Limits
from pd.api.metrics import Latencies
from pd.messages import AbortMatching, Continue, Finish, Pause, ProfileWish, StartProfile
from pd.testing import tiny_tokenizer
from pd.testing.scripted_scheduler import Reply, tokens_of
from pd.types import FinishReason, InstanceState

pytestmark = pytest.mark.process


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_tokenizer.write(tmp_path_factory.mktemp("model"))


ENDLESS = Reply(tokens=encode("Hello ") * 100, step_s=0.01)
SILENT = Reply(silent=True)


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_its_id_whatever_is_in_it(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            card = (await at.client.get("/v1/models")).json()["data"][0]
            assert (await at.client.get("/v1/models/tiny")).json() == card
            assert (await at.client.get(f"/v1/models/{model}")).json() == card  # with slashes: it is a path
            answer = await at.client.get("/v1/models/some/other")
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
            assert (await at.client.post("/v1/models/tiny")).status_code == 405
            assert (await at.client.get("/version")).json() == {"version": pd.__version__}

    run_async(main())


# --- health ----------------------------------------------------------------------------------------------------------


def test_health_generate_generates_one_token_before_all_others(run_async, model):
    async def main():
        async with serving(model, says("x"), role="decode") as at:
            assert (await at.client.get("/health_generate")).status_code == 200
            [submit] = at.scheduler.submits
            assert submit.probe and submit.sampling.max_tokens == 1 and submit.priority > 0 and not submit.prefills
            assert sum(at.app.context.latencies.first_token.cells) == 0, "no client waited for it"
            named = {"x-pd-prefill": "tcp://p:1"}
            assert (await at.client.get("/health_generate", headers=named)).status_code == 200
            assert not at.scheduler.submits[1].probe and at.scheduler.submits[1].prefills == ("tcp://p:1",)

    run_async(main())


def test_health_generate_fails_within_its_bound_unless_others_get_tokens(run_async, model):
    async def main():
        def script(submit):
            return SILENT if submit.probe else ENDLESS

        async with serving(model, script, limits=Limits(probe_s=0.2)) as at:
            began = time.monotonic()
            answer = await at.client.get("/health_generate")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
            assert time.monotonic() - began < 2
            await at.until(lambda: at.scheduler.aborts)
            body = {"prompt": "a", "max_tokens": 200}
            busy = asyncio.create_task(at.client.post("/v1/completions", json=body))
            await at.until(at.app.context.latencies.tokens)
            assert (await at.client.get("/health_generate")).status_code == 200
            assert at.engine.open_exchanges == 1
            busy.cancel()

    run_async(main())


def test_health_generate_heeds_the_tokens_of_the_instances_other_workers(run_async, model, tmp_path):
    mine, other = Latencies.shared(tmp_path, 0), Latencies.shared(tmp_path, 1)

    async def main():
        limits = Limits(probe_s=0.3)
        async with serving(model, lambda submit: SILENT, limits=limits, latencies=mine) as at:
            other.inter_token.observe(0.01)
            assert (await at.client.get("/health_generate")).status_code == 503, "that was before"
            asked = asyncio.create_task(at.client.get("/health_generate"))
            await at.until(lambda: len(at.scheduler.submits) == 2)
            other.inter_token.observe(0.01)
            assert (await asked).status_code == 200

    run_async(main())


def test_health_generate_says_why_it_failed(run_async, model):
    failed = Finish(FinishReason.ERROR, message="the runner died", status=500)

    async def main():
        async with serving(model, lambda submit: Reply(finish=failed)) as at:
            answer = await at.client.get("/health_generate")
            assert answer.status_code == 503 and "the runner died" in answer.json()["error"]["message"]
            await at.client.post("/pause_generation", json={})
            await at.until(lambda: at.engine.info.paused)
            answer = await at.client.get("/health_generate")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "paused"
            assert (await at.client.get("/health")).status_code == 200
        async with serving(model, says("x"), state=InstanceState.STARTING) as at:
            assert (await at.client.get("/health_generate")).status_code == 503
            assert not at.scheduler.submits

    run_async(main())


def test_asking_for_the_head_of_an_operation_does_nothing(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            for path in ("/flush_cache", "/continue_generation", "/generate"):
                answer = await at.client.head(path)
                assert answer.status_code == 405 and "POST" in answer.headers["allow"], path
            assert [ask.what for ask in at.scheduler.asks] == ["info"]
            assert (await at.client.head("/v1/models")).status_code == 200

    run_async(main())


# --- load ------------------------------------------------------------------------------------------------------------


def test_the_load_is_told_in_the_forms_that_routers_read(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            # The script's instance: 1 running, 2 waiting with 5 tokens, 3 of 4 blocks of 32 tokens free.
            [rank] = (await at.client.get("/get_load")).json()
            assert rank == {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 2, "num_tokens": 37}
            for path in ("/v1/loads", "/loads?include=core"):
                body = (await at.client.get(path)).json()
                [entry] = body["loads"]
                assert (entry["num_running_reqs"], entry["num_waiting_reqs"], entry["num_used_tokens"]) == (1, 2, 32)
                assert entry["max_total_num_tokens"] == 128 and entry["token_usage"] == 0.25
                assert body["aggregate"]["total_reqs"] == 3 and body["dp_rank_count"] == 1
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", body["timestamp"])

    run_async(main())


# --- aborting and pausing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_request_ends_with_that_reason(run_async, model, path, stream):
    async def main():
        async with serving(model, lambda submit: ENDLESS) as at:
            prompt = {"prompt": "a"} if path == "/v1/completions" else {"text": "a"}
            limit = {"max_tokens": 200} if path == "/v1/completions" else {"max_new_tokens": 200}
            body = {**prompt, **limit, "rid": "mine", "stream": stream}
            task = asyncio.create_task(at.client.post(path, json=body))
            await at.until(at.app.context.latencies.tokens)
            await asyncio.sleep(0.05)
            assert (await at.client.post("/abort_request", json={"rid": "other"})).json() == {"aborted": 0}
            assert (await at.client.post("/abort_request", json={"rid": "mine"})).json() == {"aborted": 1}
            answer = await task
            assert answer.status_code == 200
            last = events(answer.text)[-2] if stream else answer.json()
            if path == "/generate":
                assert last["meta_info"]["finish_reason"]["type"] == "abort"
                assert last["meta_info"]["completion_tokens"] == len(last["output_ids"]) > 0
            else:
                assert last["choices"][0]["finish_reason"] == "abort"
            await at.until(lambda: at.summaries)
            assert at.engine.open_exchanges == 0 and at.summaries[0]["finish"] == "abort"

    run_async(main())


def test_aborts_go_by_request_by_answer_by_list_or_for_all(run_async, model):
    async def main():
        async with serving(model, lambda submit: SILENT) as at:

            async def ask(path, **fields):
                return (await at.client.post(path, json={**fields})).status_code

            def names():
                return [c.rid for c in at.scheduler.commands if isinstance(c, AbortMatching)]

            tasks = [asyncio.create_task(ask("/v1/completions", prompt="a", rid=rid)) for rid in ("a", "b", "c", "d")]
            await at.until(lambda: len(at.scheduler.submits) == 4)
            assert (await at.client.post("/abort_request", json={"rid": "cmpl-a"})).json() == {"aborted": 1}
            assert names() == ["cmpl-a", "a"]
            assert (await at.client.post("/abort_request", json={"rid": ["b", "c", "zz"]})).json() == {"aborted": 2}
            assert (await at.client.post("/abort_request", json={"abort_all": True})).json()["aborted"] == 4
            assert names()[-1] == "" and await asyncio.gather(*tasks) == [200] * 4
            for wrong in ({}, {"rid": ""}, {"rid": []}, {"rid": 3}):
                answer = await at.client.post("/abort_request", json=wrong)
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "rid", wrong

    run_async(main())


def test_a_pause_reaches_the_scheduler_and_shows(run_async, model):
    async def main():
        async with serving(model, lambda submit: SILENT) as at:
            running = asyncio.create_task(at.client.post("/generate", json={"text": "a", "rid": "r"}))
            await at.until(lambda: at.scheduler.submits)
            for mode in ("in_place", "retract"):
                answer = await at.client.post("/pause_generation", json={"mode": mode})
                assert answer.status_code == 200 and answer.json()["aborted"] == 0
            assert (await at.client.get("/server_info")).json()["paused"] is True
            answer = await at.client.post("/continue_generation", json={})
            assert answer.json()["status"] == "ok" and answer.json()["paused"] is False
            assert (await at.client.get("/server_info")).json()["paused"] is False
            answer = await at.client.post("/pause_generation")  # no body: abort
            assert answer.json()["aborted"] == 1
            assert (await running).json()["meta_info"]["finish_reason"]["type"] == "abort"
            kinds = [type(command) for command in at.scheduler.commands]
            assert kinds == [Pause, Pause, Continue, Pause]
            assert [c.mode for c in at.scheduler.commands if isinstance(c, Pause)] == ["in_place", "retract", "abort"]
            assert (await at.client.post("/pause_generation", json={"mode": "later"})).status_code == 400

    run_async(main())


def test_a_profile_is_asked_of_the_runner_as_sglang_writes_it(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            body = {"activities": ["CPU"], "num_steps": "5", "output_dir": "/d", "start_step": "7"}
            body |= {"profile_by_stage": False, "profile_stages": None, "profile_prefix": None, "merge_profiles": False}
            assert (await at.client.post("/start_profile", json=body)).status_code == 200
            assert (await at.client.get("/start_profile")).status_code == 200
            stopped = await at.client.post("/stop_profile", json={"start_step": "7"})
            assert stopped.json() == {"success": True, "message": "profiling has stopped", "files": ["/a"]}
            wishes = [message.wish for message in at.scheduler.profiles if isinstance(message, StartProfile)]
            assert wishes == [ProfileWish(("CPU",), "/d", num_steps=5, start_step=7), ProfileWish()]
            at.scheduler.profile_answer = {"problem": "no disk", "param": "", "files": [], "status": 500}
            refused = await at.client.post("/stop_profile")
            assert refused.status_code == 500 and refused.json()["error"]["message"] == "no disk"

    run_async(main())


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_what_is_tokenised_is_what_a_request_would_be(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            messages = [{"role": "user", "content": "Hi"}]
            cases = [
                ("/v1/completions", {"prompt": "Hello you"}),
                ("/v1/completions", {"prompt": "Hello you", "add_special_tokens": False}),
                ("/v1/chat/completions", {"messages": messages}),
                ("/v1/chat/completions", {"messages": messages, "add_generation_prompt": False}),
            ]
            for path, body in cases:
                await at.client.post(path, json=body)
                found = (await at.client.post("/tokenize", json={**body, "return_token_strs": True})).json()
                assert found["tokens"] == tokens_of(at.scheduler.submits[-1])
                assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
                assert found["max_model_len"] == 256
            many = (await at.client.post("/v1/tokenize", json={"prompt": ["Hello", "you two"]})).json()
            alone = [(await at.client.post("/tokenize", json={"prompt": p})).json() for p in ("Hello", "you two")]
            assert many["tokens"] == [one["tokens"] for one in alone]
            assert many["count"] == [one["count"] for one in alone] and many["token_strs"] is None

    run_async(main())


def test_token_ids_become_text_again(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            ids = [tiny_tokenizer.BOS, *encode("naïve 日本")]
            found = (await at.client.post("/detokenize", json={"tokens": ids})).json()
            assert found == {"prompt": "<|bos|>naïve 日本", "text": "naïve 日本"}  # vLLM's and SGLang's defaults
            body = {"tokens": [ids, [], list(encode("b"))], "skip_special_tokens": True}
            found = (await at.client.post("/v1/detokenize", json=body)).json()
            assert found == {"prompt": ["naïve 日本", "", "b"], "text": ["naïve 日本", "", "b"]}
            assert (await at.client.post("/detokenize", json={"tokens": []})).json() == {"prompt": "", "text": ""}

    run_async(main())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens"),
        ("/detokenize", {"tokens": [[1], 2]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, None),
    ],
)
def test_a_wrong_tokenizer_request_names_its_field(run_async, model, path, body, param):
    async def main():
        async with serving(model, says("x")) as at:
            answer = await at.client.post(path, json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text

    run_async(main())
