"""The real app on real sockets, with a scripted scheduler on the other end of its channel."""

import asyncio
import itertools
import json

import pytest
from api_kit import STOP, encode, events, says, serving

from pd.api.context import Limits
from pd.messages import Finish
from pd.testing import tiny_tokenizer
from pd.testing.scripted_scheduler import Reply, tokens_of
from pd.types import FinishReason, InstanceState

pytestmark = pytest.mark.process


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_tokenizer.write(tmp_path_factory.mktemp("model"))


# --- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_has_text_usage_and_finish(run_async, model):
    async def main():
        async with serving(model, says("Hello 你好 😀", cached_tokens=2, prefill="http://p0:30000")) as at:
            answer = await at.client.post(
                "/v1/completions", json={"model": "tiny", "prompt": "Hello world", "max_tokens": 20, "temperature": 0}
            )
            body = answer.json()
            assert answer.status_code == 200
            assert answer.headers["x-pd-prefill-used"] == "http://p0:30000"
            assert body["object"] == "text_completion" and body["model"] == "tiny"
            [choice] = body["choices"]
            assert choice["text"] == "Hello 你好 😀" and choice["finish_reason"] == "stop"
            submit = at.scheduler.submits[0]
            assert tokens_of(submit) == tiny_tokenizer.byte_level().encode("Hello world").ids
            assert submit.sampling.max_tokens == 20 and submit.sampling.temperature == 0
            assert submit.sampling.stop_token_ids == (tiny_tokenizer.EOS,)
            count = len(encode("Hello 你好 😀")) + 1
            prompt = len(tokens_of(submit))
            assert body["usage"] == {
                "prompt_tokens": prompt,
                "completion_tokens": count,
                "total_tokens": prompt + count,
                "prompt_tokens_details": {"cached_tokens": 2},
            }
            await at.until(lambda: at.summaries)
            assert at.summaries[0]["completion_tokens"] == count and at.summaries[0]["status"] == 200

    run_async(main())


def test_every_form_of_prompt_is_submitted(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            for prompt, expected in [
                ("Hello", 1),
                (["Hello", "world"], 2),
                ([5, 6, 7], 1),
                ([[5, 6], [7, 8, 9]], 2),
            ]:
                at.scheduler.submits.clear()
                answer = await at.client.post("/v1/completions", json={"prompt": prompt})
                assert answer.status_code == 200, answer.text
                assert [c["index"] for c in answer.json()["choices"]] == list(range(expected))
                assert len(at.scheduler.submits) == expected
            assert [tokens_of(s) for s in at.scheduler.submits] == [[5, 6], [7, 8, 9]]
            assert len({s.sampling.seed for s in at.scheduler.submits}) == 2

    run_async(main())


def test_a_stream_is_the_same_text_in_whole_characters(run_async, model):
    text = "Hello 你好，世界 😀 naïve"

    async def main():
        async with serving(model, says(text, step_s=0.001)) as at:
            answer = await at.client.post(
                "/v1/completions",
                json={"prompt": "Hi", "stream": True, "max_tokens": 50, "stream_options": {"include_usage": True}},
            )
            assert answer.headers["content-type"].startswith("text/event-stream")
            *chunks, usage, done = events(answer.text)
            assert done == "[DONE]"
            pieces = [chunk["choices"][0]["text"] for chunk in chunks]
            assert "".join(pieces) == text and len(pieces) > 5
            assert not any("\ufffd" in piece for piece in pieces)
            assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
            assert all(chunk["usage"] is None for chunk in chunks)
            assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(encode(text)) + 1
            assert len({chunk["id"] for chunk in chunks}) == 1

    run_async(main())


def test_a_stop_string_across_tokens_ends_the_request_and_is_counted_to_its_end(run_async, model):
    async def main():
        text = "Hello world, how are you"
        endless = Reply(tokens=encode(text) * 20, step_s=0.002)
        async with serving(model, lambda submit: endless) as at:
            request = {"prompt": "Hi", "stop": ["ld, h", "zzz"], "max_tokens": 200}
            answer = await at.client.post("/v1/completions", json=request)
            body = answer.json()
            [choice] = body["choices"]
            assert choice["text"] == "Hello wor" and choice["finish_reason"] == "stop"
            assert choice["matched_stop"] == "ld, h"
            used = body["usage"]["completion_tokens"]
            decoded = tiny_tokenizer.byte_level().decode(encode(text)[:used])
            assert "ld, h" in decoded and "ld, h" not in tiny_tokenizer.byte_level().decode(encode(text)[: used - 1])
            await at.until(lambda: at.scheduler.aborts)
            assert at.scheduler.aborts[0].key == at.scheduler.submits[0].key

            answer = await at.client.post("/v1/completions", json={**request, "stream": True})
            *chunks, _ = events(answer.text)
            assert "".join(c["choices"][0]["text"] for c in chunks) == "Hello wor"

    run_async(main())


def test_completion_logprobs_align_with_the_tokens(run_async, model):
    async def main():
        async with serving(model, says("Hello world")) as at:
            request = {"prompt": "Hi", "logprobs": 2, "max_tokens": 30}
            whole = (await at.client.post("/v1/completions", json=request)).json()["choices"][0]["logprobs"]
            assert "".join(whole["tokens"]) == "Hello world<|eos|>"
            assert whole["token_logprobs"] == [-0.5] * len(whole["tokens"])
            assert whole["text_offset"][1] == len(whole["tokens"][0])
            assert all(len(top) in (2, 3) for top in whole["top_logprobs"])
            chunks = events((await at.client.post("/v1/completions", json={**request, "stream": True})).text)[:-1]
            streamed = [c["choices"][0]["logprobs"] for c in chunks]
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                assert [value for part in streamed for value in part[name]] == whole[name]

    run_async(main())


@pytest.mark.parametrize("skipped", [True, False])
def test_text_offsets_count_special_tokens_where_they_are_text(run_async, model, skipped):
    tokens = (*encode("ab"), tiny_tokenizer.EOS, *encode("cd"))

    async def main():
        async with serving(model, lambda submit: Reply(tokens=tokens)) as at:
            asked = {"prompt": "a", "ignore_eos": True, "skip_special_tokens": skipped, "logprobs": 0, "max_tokens": 9}
            choice = (await at.client.post("/v1/completions", json=asked)).json()["choices"][0]
            assert choice["text"] == ("abcd" if skipped else "ab<|eos|>cd")
            found = choice["logprobs"]
            texts = [*zip(found["tokens"], found["text_offset"], strict=True)]
            assert all(choice["text"].startswith(token, at) for token, at in texts if token != "<|eos|>")

    run_async(main())


def test_an_echo_begins_the_answer_with_its_prompt_and_the_prompts_logprobs(run_async, model):
    async def main():
        async with serving(model, says(" there")) as at:
            request = {"prompt": ["Hello you", "Hi"], "echo": True, "logprobs": 2, "max_tokens": 30}
            body = (await at.client.post("/v1/completions", json=request)).json()
            first, second = body["choices"]
            assert first["text"] == "Hello you there" and second["text"] == "Hi there"
            assert {s.logprob_start for s in at.scheduler.submits} == {0}
            assert {s.prompt_top_logprobs for s in at.scheduler.submits} == {2}
            prompt = tiny_tokenizer.byte_level().encode("Hello you").ids
            found = first["logprobs"]
            assert found["token_logprobs"] == [
                None,
                *[-0.25] * (len(prompt) - 1),
                *[-0.5] * (len(encode(" there")) + 1),
            ]
            assert found["top_logprobs"][0] is None and len(found["top_logprobs"]) == len(found["tokens"])
            texts = zip(found["tokens"], found["text_offset"], strict=True)
            assert all(first["text"][at:].startswith(token) for token, at in texts if not token.startswith("<|"))

            chunks = events((await at.client.post("/v1/completions", json={**request, "stream": True})).text)[:-1]
            for choice in body["choices"]:
                pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
                assert "".join(piece["text"] for piece in pieces) == choice["text"]
                for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                    parts = [value for piece in pieces for value in piece["logprobs"][name]]
                    assert parts == choice["logprobs"][name]

    run_async(main())


def test_a_prompt_is_scored_without_any_output(run_async, model):
    async def main():
        async with serving(model, lambda submit: Reply(tokens=encode("x"))) as at:
            prompt = tiny_tokenizer.byte_level().encode("Hello you").ids
            request = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
            body = (await at.client.post("/v1/completions", json=request)).json()
            [choice] = body["choices"]
            assert choice["text"] == "Hello you" and choice["finish_reason"] == "length"
            assert choice["logprobs"]["token_logprobs"] == [None, *[-0.25] * (len(prompt) - 1)]
            assert body["usage"]["completion_tokens"] == 0
            assert at.scheduler.submits[0].sampling.max_tokens == 1  # the scheduler always samples one
            [chunk] = events((await at.client.post("/v1/completions", json={**request, "stream": True})).text)[:-1]
            assert chunk["choices"] == [choice]

            request = {"text": "Hello", "max_new_tokens": 0, "return_logprob": True, "logprob_start_len": 0}
            body = (await at.client.post("/generate", json=request)).json()
            meta = body["meta_info"]
            assert body["text"] == "" and body["output_ids"] == [] and meta["completion_tokens"] == 0
            assert meta["finish_reason"] == {"type": "length", "length": 0} and meta["output_token_logprobs"] == []
            assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]

    run_async(main())


def test_an_echo_of_a_truncated_prompt_is_what_is_left_of_it(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            ids = tiny_tokenizer.byte_level().encode("Hello world, how are you").ids
            request = {"prompt": "Hello world, how are you", "truncate_prompt_tokens": 3, "echo": True, "max_tokens": 0}
            body = (await at.client.post("/v1/completions", json=request)).json()
            assert tokens_of(at.scheduler.submits[0]) == ids[-3:]
            assert body["choices"][0]["text"] == tiny_tokenizer.byte_level().decode(ids[-3:])
            long = {"prompt": [5] * 400, "truncate_prompt_tokens": -1, "max_tokens": 56}
            assert (await at.client.post("/v1/completions", json=long)).status_code == 200
            assert len(tokens_of(at.scheduler.submits[1])) == 200  # the context less the output
            await at.client.post("/v1/chat/completions", json={**CHAT, "truncate_prompt_tokens": 2})
            assert len(tokens_of(at.scheduler.submits[2])) == 2

    run_async(main())


def test_token_ids_are_returned_with_the_text(run_async, model):
    async def main():
        async with serving(model, says("Hello you", step_s=0.001)) as at:
            ids = [*encode("Hello you"), tiny_tokenizer.EOS]
            request = {"prompt": [[5, 6], [7]], "return_token_ids": True, "max_tokens": 30}
            choices = (await at.client.post("/v1/completions", json=request)).json()["choices"]
            assert [c["prompt_token_ids"] for c in choices] == [[5, 6], [7]]
            assert [c["token_ids"] for c in choices] == [ids, ids]
            chunks = events((await at.client.post("/v1/completions", json={**request, "stream": True})).text)[:-1]
            for index, prompt in enumerate(([5, 6], [7])):
                pieces = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
                assert [token for piece in pieces for token in piece["token_ids"]] == ids
                assert pieces[0]["prompt_token_ids"] == prompt
                assert not any("prompt_token_ids" in piece for piece in pieces[1:])

            request = {**CHAT, "return_token_ids": True}
            body = (await at.client.post("/v1/chat/completions", json=request)).json()
            assert body["prompt_token_ids"] == tokens_of(at.scheduler.submits[-1])
            assert body["choices"][0]["token_ids"] == ids
            chunks = events((await at.client.post("/v1/chat/completions", json={**request, "stream": True})).text)[:-1]
            assert chunks[0]["prompt_token_ids"] == body["prompt_token_ids"]
            assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())] == ids

    run_async(main())


def test_tokens_are_named_by_their_ids_on_request(run_async, model):
    async def main():
        async with serving(model, says("Hi")) as at:
            names = [f"token_id:{token}" for token in (*encode("Hi"), tiny_tokenizer.EOS)]
            request = {"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": True}
            found = (await at.client.post("/v1/completions", json=request)).json()["choices"][0]["logprobs"]
            assert found["tokens"] == names and all(
                name in top for name, top in zip(names, found["top_logprobs"], strict=True)
            )
            request = {**CHAT, "logprobs": True, "return_tokens_as_token_ids": True}
            content = (await at.client.post("/v1/chat/completions", json=request)).json()["choices"][0]["logprobs"]
            assert [entry["token"] for entry in content["content"]] == names

    run_async(main())


def test_prompt_logprobs_are_given_by_token_id(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            request = {"prompt": [20, 21], "prompt_logprobs": 1, "max_tokens": 3}
            [choice] = (await at.client.post("/v1/completions", json=request)).json()["choices"]
            text = tiny_tokenizer.byte_level().decode([21])
            top = {"logprob": -1.0, "rank": 1, "decoded_token": text}  # the script's alternative is the token itself
            assert choice["prompt_logprobs"] == [None, {"21": top}] and choice["logprobs"] is None
            request["prompt_logprobs"] = 0
            [choice] = (await at.client.post("/v1/completions", json=request)).json()["choices"]
            own = {"logprob": -0.25, "rank": None, "decoded_token": text}
            assert choice["prompt_logprobs"] == [None, {"21": own}]
            body = (await at.client.post("/v1/chat/completions", json={**CHAT, "prompt_logprobs": 0})).json()
            assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"] and body["prompt_logprobs"][0] is None

    run_async(main())


# --- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_rendered_by_the_models_template(run_async, model):
    async def main():
        async with serving(model, says("Fine.")) as at:
            parts = [{"type": "text", "text": "How"}, {"type": "text", "text": "are you?"}]
            messages = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": parts}]
            answer = await at.client.post("/v1/chat/completions", json={"messages": messages})
            [choice] = answer.json()["choices"]
            assert choice["message"] == {"role": "assistant", "content": "Fine."}
            text = "<|bos|><|user|>Be nice.<|user|>How\nare you?<|assistant|>"
            expected = tiny_tokenizer.byte_level().encode(text, add_special_tokens=False).ids
            submit = at.scheduler.submits[0]
            assert tokens_of(submit) == expected and expected.count(tiny_tokenizer.BOS) == 1
            assert submit.sampling.max_tokens == 256 - len(expected)  # not given: what the context has room for

    run_async(main())


def test_a_chat_stream_begins_with_the_role_and_ends_with_done(run_async, model):
    async def main():
        async with serving(model, says("Fine, 谢谢.", step_s=0.001)) as at:
            request = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_completion_tokens": 40}
            *chunks, done = events((await at.client.post("/v1/chat/completions", json=request)).text)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            assert done == "[DONE]" and deltas[0] == {"role": "assistant", "content": ""}
            assert "".join(delta.get("content", "") for delta in deltas) == "Fine, 谢谢."
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            assert chunks[0]["object"] == "chat.completion.chunk"

    run_async(main())


def test_chat_logprobs_carry_bytes_and_alternatives(run_async, model):
    async def main():
        async with serving(model, says("好")) as at:
            request = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
            content = (await at.client.post("/v1/chat/completions", json=request)).json()["choices"][0]["logprobs"]
            entries = content["content"]
            assert bytes(byte for entry in entries[:-1] for byte in entry["bytes"]) == "好".encode()
            assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
            assert entries[0]["top_logprobs"][0]["logprob"] == -1.0

    run_async(main())


# --- native ----------------------------------------------------------------------------------------------------------


def test_generate_answers_as_sglang_does(run_async, model):
    async def main():
        async with serving(model, says("Hello world", cached_tokens=1)) as at:
            request = {"text": "Hi there", "max_new_tokens": 7, "temperature": 0.5}
            body = (await at.client.post("/generate", json=request)).json()
            assert body["text"] == "Hello world" and body["output_ids"] == [*encode("Hello world"), tiny_tokenizer.EOS]
            meta = body["meta_info"]
            assert meta["finish_reason"] == {"type": "stop", "matched": tiny_tokenizer.EOS}
            assert meta["completion_tokens"] == len(body["output_ids"]) and meta["cached_tokens"] == 1
            assert meta["e2e_latency"] > 0 and meta["id"]
            assert at.scheduler.submits[0].sampling.max_tokens == 7
            assert at.scheduler.submits[0].sampling.temperature == 0.5
            request["sampling_params"] = {"max_new_tokens": 9}
            await at.client.post("/generate", json=request)
            assert at.scheduler.submits[1].sampling.max_tokens == 9  # sampling_params wins
            assert at.scheduler.submits[1].sampling.temperature == 0.5  # and the rest still counts

    run_async(main())


def test_generate_streams_cumulative_text(run_async, model):
    async def main():
        async with serving(model, says("Hello world, how are you", step_s=0.001)) as at:
            request = {"text": ["Hi", "Ho"], "stream": True, "rid": ["a", "b"]}
            *answers, done = events((await at.client.post("/generate", json=request)).text)
            assert done == "[DONE]"
            for index, rid in enumerate("ab"):
                texts = [answer["text"] for answer in answers if answer["index"] == index]
                assert texts[-1] == "Hello world, how are you" and len(texts) > 3
                assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
                assert {a["meta_info"]["id"] for a in answers if a["index"] == index} == {rid}
            assert answers[0]["meta_info"]["finish_reason"] is None

    run_async(main())


def test_generate_gives_prompt_and_output_logprobs(run_async, model):
    async def main():
        async with serving(model, says("Hi")) as at:
            request = {
                "input_ids": [10, 11, 12],
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": 2,
                "return_text_in_logprobs": True,
            }
            meta = (await at.client.post("/generate", json=request)).json()["meta_info"]
            assert [entry[:2] for entry in meta["input_token_logprobs"]] == [[None, 10], [-0.25, 11], [-0.25, 12]]
            assert meta["output_token_logprobs"][0] == [-0.5, encode("Hi")[0], meta["output_token_logprobs"][0][2]]
            assert isinstance(meta["output_token_logprobs"][0][2], str)
            assert len(meta["output_top_logprobs"][0]) == 2 and len(meta["input_top_logprobs"]) == 3
            request = {"input_ids": [10, 11, 12], "return_logprob": True, "stream": True}
            for answer in events((await at.client.post("/generate", json=request)).text)[:-1]:
                assert answer["meta_info"]["input_token_logprobs"] == []
                assert len(answer["meta_info"]["output_token_logprobs"]) == answer["meta_info"]["completion_tokens"]

    run_async(main())


def test_a_room_joins_the_batch_and_names_the_prefill(run_async, model):
    async def main():
        async with serving(model, says("Hi"), role="decode") as at:
            request = {
                "input_ids": [[10, 11], [12, 13]],
                "bootstrap_host": ["10.0.0.1", "10.0.0.2"],
                "bootstrap_port": None,
                "bootstrap_room": [7, 1 << 62],
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            answers = (await at.client.post("/generate", json=request)).json()
            first, second = at.scheduler.submits
            assert (first.room, first.prefills) == (7, ("tcp://10.0.0.1:8998",))
            assert (second.room, second.prefills) == (1 << 62, ("tcp://10.0.0.2:8998",))
            assert [a["meta_info"]["input_token_logprobs"] for a in answers] == [[], []]
            await at.client.post(
                "/v1/completions",
                json={"prompt": ["a", "b"], "bootstrap_host": "h", "bootstrap_port": 9000, "bootstrap_room": 5},
                headers={"x-pd-prefill": "tcp://p0:1, tcp://p1:2"},
            )
            assert [s.room for s in at.scheduler.submits[2:]] == [5, 6]
            assert at.scheduler.submits[2].prefills == ("tcp://p0:1", "tcp://p1:2", "tcp://h:9000")
            lists = {
                "bootstrap_host": ["h", "h", "i", "i"],
                "bootstrap_port": [1, 1, 2, 2],
                "bootstrap_room": [6, 7, 8, 9],
            }
            await at.client.post("/v1/completions", json={"prompt": ["a", "b"], **lists})
            found = [(s.room, s.prefills) for s in at.scheduler.submits[4:]]
            assert found == [(6, ("tcp://h:1",)), (8, ("tcp://i:2",))], "a room per choice: a prompt goes by its first"
            await at.client.post("/v1/completions", json={"prompt": ["a", "b"], "bootstrap_room": (1 << 63) - 1})
            assert [s.room for s in at.scheduler.submits[6:]] == [(1 << 63) - 1, 0]
            wrong = await at.client.post("/v1/completions", json={"prompt": ["a", "b"], "bootstrap_room": [1, 2, 3]})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "bootstrap_room")

    run_async(main())


# --- errors ----------------------------------------------------------------------------------------------------------

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BAD = [
    ("/v1/completions", {"prompt": "Hi", "temperature": -1}, "temperature"),
    ("/v1/completions", {"prompt": "Hi", "temperature": "hot"}, "temperature"),
    ("/v1/completions", {"prompt": "Hi", "top_p": 0}, "top_p"),
    ("/v1/completions", {"prompt": "Hi", "n": 129}, "n"),
    ("/v1/completions", {"prompt": "Hi", "n": 0}, "n"),
    ("/v1/completions", {"prompt": "Hi", "echo": "yes"}, "echo"),
    ("/v1/completions", {"prompt": "Hi", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ("/v1/completions", {"prompt": "Hi", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("/v1/completions", {"prompt": "Hi", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ("/v1/completions", {"prompt": "Hi", "bad_words": ["x"]}, "bad_words"),
    ("/v1/completions", {"prompt": ["Hi"] * 64, "n": 65}, "n"),
    ("/v1/completions", {"prompt": "Hi", "n": 3, "best_of": 2}, "best_of"),
    ("/v1/completions", {"prompt": "Hi", "best_of": 129}, "best_of"),
    ("/v1/completions", {"prompt": "Hi", "best_of": 2, "stream": True}, "best_of"),
    ("/v1/completions", {"prompt": "Hi", "suffix": "x"}, "suffix"),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 1000}, "max_tokens"),
    ("/v1/completions", {"prompt": [5] * 300}, "prompt"),
    ("/v1/completions", {"prompt": [5, 100000]}, "prompt"),
    ("/v1/completions", {"prompt": [5, "x"]}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {}, None),
    ("/v1/completions", {"prompt": "Hi", "stop": ["a"] * 65}, "stop"),
    ("/v1/completions", {"prompt": "Hi", "stop": ""}, "stop"),
    ("/v1/completions", {"prompt": "Hi", "logprobs": 99}, "logprobs"),
    ("/v1/completions", {"prompt": "Hi", "logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "Hi", "guided_json": {"type": "thing"}}, "guided_json"),
    ("/v1/completions", {"prompt": "Hi", "stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", {"prompt": "Hi", "bootstrap_room": -4}, "bootstrap_room"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools[0].function"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ("/v1/chat/completions", {**CHAT, "functions": [{"name": "f"}]}, "functions"),
    ("/v1/chat/completions", {**CHAT, "chat_template": "{{ 1 }}"}, "chat_template"),
    (
        "/v1/chat/completions",
        {**CHAT, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "structural_tag"}}, "response_format"),
    ("/v1/chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
    ("/generate", {"text": "a", "input_ids": [1]}, "text"),
    ("/generate", {}, "text"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ("/generate", {"text": "a", "sampling_params": {"regex": "("}}, "sampling_params.regex"),
    ("/generate", {"text": "a", "sampling_params": {"top_k": "x"}}, "sampling_params.top_k"),
    ("/generate", {"text": "a", "image_data": "x"}, "image_data"),
    ("/generate", {"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
    ("/generate", {"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 3}]}, "sampling_params.n"),
    ("/generate", {"text": ["a", "b"], "rid": ["only one"]}, "rid"),
    ("/generate", {"text": "a", "return_logprob": True, "logprob_start_len": 90}, "logprob_start_len"),
    ("/generate", {"text": ["a", "b"], "token_ids_logprob": [[1], 2]}, "token_ids_logprob"),
    ("/generate", {"text": ["a", "b"], "token_ids_logprob": [2, [1]]}, "token_ids_logprob"),
    ("/generate", {"text": ["a", "b"], "token_ids_logprob": [[1]]}, "token_ids_logprob"),
]


def test_wrong_requests_get_400_and_the_name_of_the_field(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            for path, body, param in BAD:
                answer = await at.client.post(path, json=body)
                assert answer.status_code == 400, (body, answer.text)
                error = answer.json()["error"]
                assert error["param"] == param, (body, error)
                assert error["type"] == "invalid_request_error" and error["message"]
            assert not at.scheduler.submits

    run_async(main())


def test_neutral_values_of_unsupported_fields_and_unknown_fields_are_accepted(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            body = {"prompt": "Hi", "n": 1, "best_of": 1, "echo": False, "suffix": None, "user": "u", "whatever": [1]}
            assert (await at.client.post("/v1/completions", json=body)).status_code == 200
            chat = {**CHAT, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
            assert (await at.client.post("/v1/chat/completions", json=chat)).status_code == 200

    run_async(main())


def test_protocol_errors_have_error_bodies_too(run_async, model):
    async def main():
        async with serving(model, says("x"), limits=Limits(body_bytes=1000)) as at:
            expected = [
                (at.client.get("/nothing"), 404),
                (at.client.get("/v1/completions"), 405),
                (at.client.post("/v1/completions", content=b'{"prompt": "', headers=JSON), 400),
                (at.client.post("/v1/completions", content=b'{"prompt": "\xff"}', headers=JSON), 400),
                (at.client.post("/v1/completions", content=b"[1]", headers=JSON), 400),
                (at.client.post("/v1/completions", content=b"a=b", headers={"content-type": "text/plain"}), 415),
                (at.client.post("/v1/completions", json={"prompt": "x" * 2000}), 413),
                (at.client.post("/v1/completions", json={"prompt": "x", "model": "other"}), 404),
                (at.client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-timeout": "soon"}), 400),
                (at.client.post("/v1/completions", json={"prompt": "x"}, headers={"x-pd-prefill": "http://x"}), 400),
            ]
            for request, status in expected:
                answer = await request
                assert answer.status_code == status, answer.text
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    run_async(main())


def test_a_chunked_body_is_bounded_as_well(run_async, model):
    async def main():
        async def parts():
            for _ in range(50):
                yield b"x" * 100

        async with serving(model, says("x"), limits=Limits(body_bytes=1000)) as at:
            answer = await at.client.post("/v1/completions", content=parts(), headers=JSON)
            assert answer.status_code == 413

    run_async(main())


def test_a_rejection_keeps_its_status(run_async, model):
    async def main():
        async with serving(model, lambda submit: Reply(rejected=(503, "the queue is full"))) as at:
            for stream in (False, True):
                answer = await at.client.post("/v1/completions", json={"prompt": "Hi", "stream": stream})
                assert answer.status_code == 503
                assert answer.json()["error"]["message"] == "the queue is full"

    run_async(main())


def test_an_error_before_the_first_byte_has_its_status_and_after_it_is_the_last_event(run_async, model):
    failed = Finish(FinishReason.ERROR, message="the runner died", status=502)

    async def main():
        async with serving(model, lambda submit: Reply(finish=failed)) as at:
            answer = await at.client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
            assert answer.status_code == 502 and answer.json()["error"]["message"] == "the runner died"
        late = Reply(tokens=encode("Hello"), finish=failed, step_s=0.01)
        async with serving(model, lambda submit: late) as at:
            answer = await at.client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
            assert answer.status_code == 200
            last = events(answer.text)[-1]
            assert last["error"]["message"] == "the runner died"
            answer = await at.client.post("/v1/completions", json={"prompt": "Hi"})
            assert answer.status_code == 502

    run_async(main())


def test_one_failing_prompt_fails_the_batch_and_stops_the_others(run_async, model):
    def script(submit):
        if tokens_of(submit) == [9]:
            return Reply(rejected=(400, "too long"))
        return Reply(tokens=encode("Hello world") * 50, step_s=0.01)

    async def main():
        async with serving(model, script) as at:
            answer = await at.client.post("/v1/completions", json={"prompt": [[5], [9], [6]], "max_tokens": 200})
            assert answer.status_code == 400
            await at.until(lambda: len(at.scheduler.aborts) == 2)
            assert {a.key for a in at.scheduler.aborts} == {at.scheduler.submits[0].key, at.scheduler.submits[2].key}

    run_async(main())


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_while_waiting_aborts_all_prompts(run_async, model, stream):
    async def main():
        async with serving(model, lambda submit: Reply(silent=True)) as at:
            task = asyncio.create_task(at.client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": stream}))
            await at.until(lambda: len(at.scheduler.submits) == 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await at.until(lambda: len(at.scheduler.aborts) == 2)
            await at.until(lambda: at.summaries)
            assert at.engine.open_exchanges == 0 and at.summaries[0]["status"] == 499

    run_async(main())


def test_a_disconnect_in_the_middle_of_a_stream_aborts(run_async, model):
    async def main():
        endless = Reply(tokens=encode("Hello ") * 100, step_s=0.01)
        async with serving(model, lambda submit: endless) as at:
            request = {"prompt": "a", "stream": True, "max_tokens": 240}
            async with at.client.stream("POST", "/v1/completions", json=request) as answer:
                async for _ in answer.aiter_text():
                    break
            await at.until(lambda: at.scheduler.aborts)
            await at.until(lambda: at.summaries)
            assert at.engine.open_exchanges == 0

    run_async(main())


def test_a_dead_scheduler_ends_every_request_and_health_says_so(run_async, model):
    async def main():
        async with serving(model, lambda submit: Reply(silent=True)) as at:
            posts = [at.client.post("/v1/completions", json={"prompt": "a", "stream": s}) for s in (True, False)]
            tasks = [asyncio.create_task(post) for post in posts]
            await at.until(lambda: len(at.scheduler.submits) == 2)
            at.scheduler.channel.close()
            for answer in await asyncio.gather(*tasks):
                assert answer.status_code == 503 and "scheduler is gone" in answer.json()["error"]["message"]
            assert (await at.client.get("/health")).status_code == 503
            assert (await at.client.post("/v1/completions", json={"prompt": "a"})).status_code == 503
            assert (await at.client.get("/metrics")).status_code == 503

    run_async(main())


def test_a_silent_scheduler_ends_a_request_by_its_deadline(run_async, model):
    async def main():
        async with serving(model, lambda submit: Reply(silent=True), idle_timeout_s=0.2) as at:
            task = asyncio.create_task(at.client.post("/v1/completions", json={"prompt": "a"}))
            await at.until(lambda: at.scheduler.submits)
            assert at.scheduler.submits[0].idle_timeout_ms == 200
            at.engine.clock = lambda: asyncio.get_running_loop().time() + 60
            at.engine.sweep_once()
            assert (await task).status_code == 504
            await at.until(lambda: at.scheduler.aborts)

    run_async(main())


def test_health_and_new_requests_follow_the_instances_state(run_async, model):
    async def main():
        async with serving(model, says("x", step_s=0.05), state=InstanceState.STARTING) as at:
            answer = await at.client.get("/health")
            assert answer.status_code == 503 and answer.json()["status"] == "starting"
            assert (await at.client.post("/v1/completions", json={"prompt": "a"})).status_code == 503
            at.scheduler.announce(InstanceState.READY)
            await at.until(lambda: not at.engine.unready())
            assert (await at.client.get("/health")).status_code == 200
            running = asyncio.create_task(at.client.post("/v1/completions", json={"prompt": "a"}))
            await at.until(lambda: at.scheduler.submits)
            at.scheduler.announce(InstanceState.DRAINING)
            await at.until(at.engine.unready)
            refused = await at.client.post("/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert (await running).status_code == 200  # what runs is finished

    run_async(main())


def test_a_client_that_does_not_read_costs_no_more_than_its_text(run_async, model):
    """The stream is coalesced while the client's socket is full, and given up after a bound."""

    async def main():
        many = Reply(tokens=encode("Hello world, ") * 8000, per_step=250)

        async with serving(model, lambda submit: many, limits=Limits(write_s=0.5), context=1 << 20) as at:
            reader, writer = await asyncio.open_connection("127.0.0.1", at.port, limit=1024)
            body = json.dumps({"text": "a", "max_new_tokens": 100000, "stream": True}).encode()
            writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            await at.until(lambda: at.app.writers._since)
            writing = dict(at.app.writers._since)
            await asyncio.sleep(0.6)
            at.app.writers.sweep_once()
            await at.until(lambda: at.summaries)
            assert writing and at.summaries[0]["status"] == 499 and at.engine.open_exchanges == 0
            writer.close()
            del reader

    run_async(main())


# --- the rest --------------------------------------------------------------------------------------------------------


def test_request_id_timeout_and_prefills_travel(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            headers = {"x-request-id": "my-id", "x-request-timeout": "2.5", "x-pd-prefill": "tcp://p:1,tcp://[::1]:2"}
            answer = await at.client.post("/v1/completions", json={"prompt": "a", "cache_salt": "s"}, headers=headers)
            submit = at.scheduler.submits[0]
            assert answer.headers["x-request-id"] == "my-id" == submit.rid
            assert 2000 < submit.client_timeout_ms <= 2500
            assert submit.prefills == ("tcp://p:1", "tcp://[::1]:2") and submit.salt == "s"

    run_async(main())


def test_a_clients_own_id_names_its_request_whatever_a_router_calls_it(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            routed = {"x-request-id": "minted"}
            for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", CHAT)):
                answer = await at.client.post(path, json={**body, "rid": "mine"}, headers=routed)
                assert answer.headers["x-request-id"] == "mine" == at.scheduler.submits[-1].rid
                assert answer.json()["id"].endswith("-mine")
            answers = (
                await at.client.post("/generate", json={"text": ["a", "b"], "rid": "mine"}, headers=routed)
            ).json()
            assert [a["meta_info"]["id"] for a in answers] == ["mine-0", "mine-1"]
            several = {"prompt": ["a", "b"], "rid": ["p", "q"], "cache_salt": ["s", None], "extra_key": "t"}
            assert (await at.client.post("/v1/completions", json=several, headers=routed)).json()["id"] == "cmpl-minted"
            assert [(s.rid, s.salt) for s in at.scheduler.submits[-2:]] == [("p", "s\nt"), ("q", "t")]
            assert (await at.client.post("/v1/chat/completions", json={**CHAT, "rid": ["c"]})).status_code == 200
            assert at.scheduler.submits[-1].rid == "c"

    run_async(main())


def test_an_id_that_no_header_can_carry_is_answered_without_what_is_unfit(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            answer = await at.client.post("/generate", json={"text": "a", "rid": "a\r\nset-cookie: b\x7f日"})
            assert answer.status_code == 200 and answer.json()["meta_info"]["id"] == "a\r\nset-cookie: b\x7f日"
            assert answer.headers["x-request-id"] == "a??set-cookie: b??" and "set-cookie" not in answer.headers
            answer = await at.client.post("/v1/completions", json={"prompt": [], "rid": "x" * 5000})
            assert answer.status_code == 400 and len(answer.headers["x-request-id"]) == 256

    run_async(main())


def test_models_and_infos_describe_the_instance(run_async, model):
    async def main():
        async with serving(model, says("x"), role="decode") as at:
            assert (await at.client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
            for path in ("/server_info", "/get_server_info"):
                info = (await at.client.get(path)).json()
                assert info["role"] == "decode" and info["state"] == "ready" and info["load"]["free_blocks"] == 3
                assert info["control_endpoint"] == "tcp://127.0.0.1:9" and "audit" not in info
            assert (await at.client.get("/server_info?audit=1")).json()["audit"] == {"balanced": True}
            for path in ("/model_info", "/get_model_info"):
                assert (await at.client.get(path)).json()["model_path"] == str(model)
            assert (await at.client.post("/flush_cache")).json() == {"freed_blocks": 3}

    run_async(main())


def test_metrics_have_the_agreed_names(run_async, model):
    async def main():
        async with serving(model, says("Hello world")) as at:
            at.scheduler.answers["metrics"] = {
                "kv_blocks": {"free": 7, "owned": 1},
                "requests": {"running": 2},
                "kv_pushed_bytes": 10,
                "kv_landed_bytes": 20,
                "prompt_tokens": {"computed": 5},
                "handoffs": {"ready": 3},
            }
            await at.client.post("/v1/completions", json={"prompt": "a"})
            answer = await at.client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            lines = answer.text.splitlines()
            for line in (
                'pd_requests{state="running"} 2.0',
                'pd_kv_blocks{state="free"} 7.0',
                'pd_kv_blocks{state="quarantined"} 0.0',
                "pd_kv_pushed_bytes_total 10.0",
                "pd_kv_landed_bytes_total 20.0",
                'pd_prompt_tokens_total{source="computed"} 5.0',
                'pd_handoffs_total{outcome="ready"} 3.0',
                "pd_time_to_first_token_seconds_count 1.0",
                f"pd_inter_token_latency_seconds_count {float(len(encode('Hello world')))}",
            ):
                assert line in lines, answer.text

    run_async(main())


def test_a_scrape_fails_within_its_bound_when_the_scheduler_does_not_answer(run_async, model):
    async def main():
        async with serving(model, says("x"), limits=Limits(scrape_s=0.05)) as at:
            answer = await at.client.get("/metrics")
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "scheduler_unavailable"

    run_async(main())


def test_an_http2_preface_gets_an_error_and_not_a_hang(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            async with asyncio.timeout(5):
                data = await reader.read()
            assert data.startswith(b"HTTP/1.1 4") or data == b""
            writer.close()

    run_async(main())


# --- several choices --------------------------------------------------------------------------------------------------

#: What each choice says, the third ending at a stop string.
VOICES = ("first", "the second, which goes on for longest", "a third X and more")


def voices(**options):
    tokens = [(*encode(text), tiny_tokenizer.EOS) for text in VOICES]
    reply = Reply(tokens=tokens[0], others=tuple(tokens[1:]), finish=STOP, **options)
    return lambda submit: reply


def test_choices_are_numbered_by_prompt_and_the_prompt_counts_once(run_async, model):
    async def main():
        async with serving(model, voices(cached_tokens=1)) as at:
            body = {"prompt": ["Hi", "Hello"], "n": 3, "max_tokens": 50, "stop": ["X"], "logprobs": 1}
            answer = (await at.client.post("/v1/completions", json=body)).json()
            texts = ["first", VOICES[1], "a third "]
            assert [(c["index"], c["text"]) for c in answer["choices"]] == list(enumerate(texts * 2))
            assert [c["matched_stop"] for c in answer["choices"][:3]] == [tiny_tokenizer.EOS, tiny_tokenizer.EOS, "X"]
            assert all(len(c["logprobs"]["tokens"]) > 2 for c in answer["choices"])
            submits = at.scheduler.submits
            assert [(s.choices, s.sampling.choice) for s in submits] == [(3, 0), (3, 0)]
            assert answer["usage"]["prompt_tokens"] == sum(len(tokens_of(s)) for s in submits)
            counts = [len(encode(text)) + 1 for text in VOICES[:2]] + [len(encode("a third X"))]
            assert answer["usage"]["completion_tokens"] == 2 * sum(counts)
            assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}

    run_async(main())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streamed_choices_come_interleaved_each_under_its_index(run_async, model, path):
    async def main():
        async with serving(model, voices(step_s=0.002)) as at:
            body = CHAT if "chat" in path else {"prompt": "Hi"}
            options = {"stream": True, "stream_options": {"include_usage": True}}
            answer = await at.client.post(path, json={**body, "n": 3, "stop": "X", **options})
            chunks = events(answer.text)
            assert chunks[-1] == "[DONE]" and chunks[-2]["choices"] == []
            texts, ends, order = ["", "", ""], {}, []
            for chunk in chunks[:-2]:
                [choice] = chunk["choices"]
                assert choice["index"] not in ends, "nothing follows a choice's end"
                texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                order.append(choice["index"])
                if choice["finish_reason"]:
                    ends[choice["index"]] = choice["finish_reason"]
            assert texts == ["first", VOICES[1], "a third "] and ends == dict.fromkeys(range(3), "stop")
            assert order != sorted(order)
            assert chunks[-2]["usage"]["prompt_tokens"] == len(tokens_of(at.scheduler.submits[0]))
            await at.until(lambda: at.scheduler.aborts)
            assert [abort.choice for abort in at.scheduler.aborts] == [2], "the others go on"

    run_async(main())


def test_a_chat_answer_has_a_message_for_each_choice(run_async, model):
    async def main():
        async with serving(model, voices()) as at:
            answer = (await at.client.post("/v1/chat/completions", json={**CHAT, "n": 2})).json()
            assert [c["message"]["content"] for c in answer["choices"]] == ["first", VOICES[1]]
            assert [c["index"] for c in answer["choices"]] == [0, 1]

    run_async(main())


def test_generate_with_n_answers_a_list_by_prompt(run_async, model):
    async def main():
        async with serving(model, voices()) as at:
            sampling = {"n": 2, "max_new_tokens": 40}
            body = {"text": "Hi", "rid": "r", "sampling_params": sampling, "return_logprob": True}
            answers = (await at.client.post("/generate", json=body)).json()
            assert [a["text"] for a in answers] == ["first", VOICES[1]]
            assert [a["meta_info"]["id"] for a in answers] == ["r-0", "r-1"]
            assert {a["meta_info"]["prompt_tokens"] for a in answers} == {len(tokens_of(at.scheduler.submits[0]))}
            for answer in answers:
                assert len(answer["meta_info"]["output_token_logprobs"]) == answer["meta_info"]["completion_tokens"]
            body = {"text": ["Hi", "Ho"], "sampling_params": [sampling, sampling], "stream": True}
            chunks = events((await at.client.post("/generate", json=body)).text)[:-1]
            last = {chunk["index"]: chunk["text"] for chunk in chunks}
            assert last == dict(enumerate(["first", VOICES[1]] * 2))

    run_async(main())


def test_best_of_returns_the_best_candidates_and_counts_all(run_async, model):
    async def main():
        async with serving(model, voices(logprobs=(-0.9, -0.1, -0.4))) as at:
            body = {"prompt": "Hi", "best_of": 3, "n": 2, "max_tokens": 50}
            answer = (await at.client.post("/v1/completions", json=body)).json()
            assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, VOICES[1]), (1, VOICES[2])]
            assert all(c["logprobs"] is None for c in answer["choices"]), "they rank; nobody asked to see them"
            assert answer["usage"]["completion_tokens"] == sum(len(encode(text)) + 1 for text in VOICES)
            assert at.scheduler.submits[0].choices == 3 and at.scheduler.submits[0].sampling.logprobs

    run_async(main())


def test_rooms_may_come_one_per_prompt_or_one_per_choice(run_async, model):
    async def main():
        async with serving(model, says("x")) as at:
            for rooms in ([7, 8], 7):
                body = {**CHAT, "n": 2, "bootstrap_room": rooms, "bootstrap_host": ["h", "h"]}
                assert (await at.client.post("/v1/chat/completions", json=body)).status_code == 200
            assert [(s.room, s.choices) for s in at.scheduler.submits] == [(7, 2), (7, 2)]

    run_async(main())
