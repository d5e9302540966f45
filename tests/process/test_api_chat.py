"""Tools and thoughts over HTTP, with the real client library, against a service whose scheduler is scripted."""

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import openai
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer as Library

from pd.api.service import ApiConfig, Service
from pd.config import ChatConfig, HttpConfig
from pd.messages import Finish
from pd.testing import tiny_tokenizer
from pd.testing.scripted_scheduler import Reply, ScriptedScheduler, channel_pair, tokens_of
from pd.types import FinishReason, ModelInfo

pytestmark = pytest.mark.process

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
STOP = Finish(FinishReason.STOP, stop_id=tiny_tokenizer.EOS)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"about {name}",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "clock")
]
ASK = [{"role": "user", "content": "How is it in Köln?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def tokenizer():
    """With markup in tokens of its own, of which only the tag is special, as models have them."""
    library = Library.from_str(tiny_tokenizer.byte_level().to_str())
    library.add_tokens(MARKUP)
    library.add_special_tokens(["<|python_tag|>"])
    return library


def encode(text):
    return tokenizer().encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories by the name of their chat template."""
    made = {}
    for file in TEMPLATES.glob("*.jinja"):
        folder = tmp_path_factory.mktemp(file.stem)
        path = str(tiny_tokenizer.write(folder, tokenizer, chat_template=file.read_text()))
        made[file.stem] = ModelInfo(
            "tiny", path, "L", tokenizer().get_vocab_size(), 4096, 2, 2, 2, 8, 16, "float32", (tiny_tokenizer.EOS,), "f"
        )
    return made


@contextlib.asynccontextmanager
async def serving(model, text, *, end=STOP, per_step=1, **chat):
    """Yields (the OpenAI client, the scripted scheduler, a plain client)."""
    tokens = (*encode(text), *([tiny_tokenizer.EOS] if end is STOP else []))
    api_end, scheduler_end = channel_pair()
    scheduler = ScriptedScheduler(scheduler_end, lambda submit: Reply(tokens=tokens, finish=end, per_step=per_step))
    config = ApiConfig(model, "", http=HttpConfig(port=0, drain_timeout=1.0), chat=ChatConfig(**chat))
    service = Service(config, api_end, lambda summary: None)
    stopping, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    answering = asyncio.ensure_future(scheduler.run())
    task = asyncio.ensure_future(service.run(stopping, ready.set_result))
    try:
        url = f"http://127.0.0.1:{(await ready)['port']}"
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client,
            httpx.AsyncClient(base_url=url, timeout=10) as plain,
        ):
            yield client.chat.completions, scheduler, plain
    finally:
        stopping.set()
        answering.cancel()
        await asyncio.gather(task, answering, return_exceptions=True)


async def collect(stream):
    """A stream put together as clients do: (content, reasoning, calls, finish reason, usage)."""
    content, reasoning, calls, finish, usage = "", "", [], None, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            for part in delta.tool_calls or ():
                if part.index == len(calls):
                    assert part.type == "function" and part.function.arguments == ""
                    calls.append([part.id, part.function.name, ""])
                else:
                    assert part.id is None and part.function.name is None and part.index == len(calls) - 1
                    calls[part.index][2] += part.function.arguments
            finish = choice.finish_reason or finish
    return content, reasoning, calls, finish, usage


# --- tools -----------------------------------------------------------------------------------------------------------


def test_calls_come_as_openai_has_them(run_async, models):
    async def main():
        async with serving(models["qwen2.5"], "Let me look.\n" + CALL + "\n" + OTHER) as (chat, scheduler, _):
            answer = await chat.create(model="tiny", messages=ASK, tools=TOOLS)
            [choice] = answer.choices
            assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
            calls = choice.message.tool_calls
            assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
                ("function", "weather", '{"city": "Köln"}'),
                ("function", "clock", "{}"),
            ]
            assert len({c.id for c in calls}) == 2 and all(c.id.startswith("call_") for c in calls)
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert '"name": "weather"' in prompt and scheduler.submits[0].sampling.grammar == ""

    run_async(main())


@pytest.mark.parametrize("per_step", [1, 3, 1000])
def test_a_stream_of_calls_is_put_together_to_the_same(run_async, models, per_step):
    async def main():
        text = "<think>\nHm.\n</think>\n\nLet me look.\n" + CALL + "\n" + OTHER
        async with serving(models["qwen3"], text, per_step=per_step) as (chat, _, _):
            options = {"include_usage": True}
            stream = await chat.create(model="tiny", messages=ASK, tools=TOOLS, stream=True, stream_options=options)
            content, reasoning, calls, finish, usage = await collect(stream)
            assert (content, reasoning, finish) == ("Let me look.", "Hm.", "tool_calls")
            assert [call[1:] for call in calls] == [["weather", '{"city": "Köln"}'], ["clock", "{}"]]
            thoughts = len(encode("<think>\nHm.\n</think>"))
            assert usage.completion_tokens_details.reasoning_tokens == thoughts
            assert usage.completion_tokens == len(encode(text)) + 1

    run_async(main())


def test_llamas_tag_is_a_special_token_that_is_understood_and_never_shown(run_async, models):
    async def main():
        text = '<|python_tag|>{"name": "weather", "parameters": {"city": "Köln"}}; {"name": "clock", "parameters": {}}'
        async with serving(models["llama3.1"], text) as (chat, _, _):
            answer = await chat.create(model="tiny", messages=ASK, tools=TOOLS)
            message = answer.choices[0].message
            assert message.content is None and [c.function.name for c in message.tool_calls] == ["weather", "clock"]
            stream = await chat.create(model="tiny", messages=ASK, tools=TOOLS, stream=True)
            content, _, calls, finish, _ = await collect(stream)
            assert content == "" and finish == "tool_calls"
            assert [call[1:] for call in calls] == [["weather", '{"city": "Köln"}'], ["clock", "{}"]]
            plain = await chat.create(model="tiny", messages=ASK)
            assert plain.choices[0].message.content == text.removeprefix("<|python_tag|>")

    run_async(main())


def test_each_chunk_of_a_stream_has_the_form_that_openai_documents(run_async, models):
    async def main():
        async with serving(models["qwen2.5"], "a <b" + CALL, per_step=2) as (_, _, plain):
            request = {"messages": ASK, "tools": TOOLS, "stream": True, "logprobs": True}
            answer = await plain.post("/v1/chat/completions", json=request)
            *chunks, done = [block.removeprefix("data: ") for block in answer.text[:-2].split("\n\n")]
            choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
            deltas = [choice["delta"] for choice in choices]
            assert done == "[DONE]" and deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
            parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
            call_id = parts[0].pop("id")
            assert parts[0] == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}
            assert all(part.keys() == {"index", "function"} for part in parts[1:]) and call_id.startswith("call_")
            assert "".join(part["function"]["arguments"] for part in parts[1:]) == '{"city": "Köln"}'
            assert "".join(delta.get("content", "") for delta in deltas) == "a <b"
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
            shown = sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"])
            assert shown == len(encode("a <b" + CALL)) + 1, "each token's logprob comes once"

    run_async(main())


def test_a_call_that_is_cut_off_is_content_and_in_a_stream_arguments_without_end(run_async, models):
    async def main():
        cut = CALL[:-20]
        async with serving(models["qwen2.5"], cut, end=Finish(FinishReason.LENGTH)) as (chat, _, _):
            [choice] = (await chat.create(model="tiny", messages=ASK, tools=TOOLS)).choices
            assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("length", cut, None)
            stream = await chat.create(model="tiny", messages=ASK, tools=TOOLS, stream=True)
            _, _, [[_, name, arguments]], finish, _ = await collect(stream)
            assert finish == "length" and name == "weather" and '{"city": "Köln"}'.startswith(arguments)

    run_async(main())


def test_the_history_of_calls_and_results_is_rendered(run_async, models):
    async def main():
        async with serving(models["qwen2.5"], "It is warm.") as (chat, scheduler, _):
            function = {"name": "weather", "arguments": '{"city": "Köln"}'}
            messages = [
                *ASK,
                {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "20 °C"},
            ]
            answer = await chat.create(model="tiny", messages=messages, tools=TOOLS, tool_choice="none")
            assert answer.choices[0].message.content == "It is warm." and answer.choices[0].finish_reason == "stop"
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert CALL in prompt and "<tool_response>\n20 °C\n</tool_response>" in prompt
            assert "about clock" not in prompt, "without a choice of tools the model is not shown them"

    run_async(main())


def test_a_history_of_calls_is_rendered_by_templates_that_take_arguments_as_text(run_async, models):
    async def main():
        async with serving(models["deepseek-r1"], "</think>Yes.") as (chat, scheduler, _):
            function = {"name": "weather", "arguments": '{"city":"Köln"}'}
            calls = [{"id": "call_1", "type": "function", "function": function}]
            messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": calls}]
            messages.append({"role": "tool", "tool_call_id": "call_1", "content": "20 °C"})
            await chat.create(model="tiny", messages=messages)
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert '```json\n{"city": "Köln"}\n```' in prompt and "<|output|>20 °C" in prompt

    run_async(main())


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "clock", "arguments": {"city": "x"}}\n</tool_call>'),
        ("llama3.1", '{"name": "clock", "parameters": {"city": "x"}}'),
        ("chatml", '{"name": "clock", "parameters": {"city": "x"}}'),
    ],
)
def test_a_forced_call_has_a_grammar_and_comes_out_as_a_call(run_async, models, template, text):
    async def main():
        async with serving(models[template], text) as (chat, scheduler, _):
            for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
                answer = await chat.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice)
                [call] = answer.choices[0].message.tool_calls
                assert (call.function.name, call.function.arguments) == ("clock", '{"city": "x"}')
                assert answer.choices[0].finish_reason == "tool_calls"
            grammars = [submit.sampling.grammar for submit in scheduler.submits]
            assert all(grammar and LLMatcher.validate_grammar(grammar, None) == "" for grammar in grammars)
            assert "weather" in grammars[0] and "weather" not in grammars[1]

    run_async(main())


def test_parallel_calls_can_be_switched_off(run_async, models):
    async def main():
        async with serving(models["qwen2.5"], CALL + "\n" + OTHER) as (chat, _, _):
            answer = await chat.create(model="tiny", messages=ASK, tools=TOOLS, parallel_tool_calls=False)
            assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["weather"]

    run_async(main())


def test_tools_of_a_model_whose_format_is_not_known_name_the_flag_which_helps(run_async, models):
    async def main():
        async with serving(models["chatml"], CALL) as (chat, _, _):
            with pytest.raises(openai.BadRequestError, match="--tool-call-parser") as caught:
                await chat.create(model="tiny", messages=ASK, tools=TOOLS)
            assert caught.value.param == "tools"
        async with serving(models["chatml"], CALL, tool_call_parser="hermes") as (chat, _, _):
            answer = await chat.create(model="tiny", messages=ASK, tools=TOOLS)
            assert answer.choices[0].message.tool_calls[0].function.name == "weather"

    run_async(main())


# --- thoughts --------------------------------------------------------------------------------------------------------


def test_thoughts_come_apart_from_the_answer(run_async, models):
    async def main():
        async with serving(models["deepseek-r1"], "\nHm, <b>.\n</think>\n\nYes.") as (chat, scheduler, _):
            answer = await chat.create(model="tiny", messages=ASK)
            message = answer.choices[0].message
            assert (message.content, message.reasoning_content) == ("Yes.", "Hm, <b>.")
            thoughts = len(encode("\nHm, <b>.\n</think>"))
            assert answer.usage.completion_tokens_details.reasoning_tokens == thoughts
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert prompt.endswith("<think>\n"), "the template opened it"
            content, reasoning, _, finish, _ = await collect(await chat.create(model="tiny", messages=ASK, stream=True))
            assert (content, reasoning, finish) == ("Yes.", "Hm, <b>.", "stop")

    run_async(main())


def test_thoughts_stay_in_the_content_where_that_is_wanted(run_async, models):
    async def main():
        text = "<think>\nHm.\n</think>\n\nYes."
        async with serving(models["qwen3"], text) as (chat, _, _):
            together = {"separate_reasoning": False}
            answer = await chat.create(model="tiny", messages=ASK, extra_body=together)
            assert answer.choices[0].message.content == text
            content, reasoning, *_ = await collect(
                await chat.create(model="tiny", messages=ASK, stream=True, extra_body=together)
            )
            assert (content, reasoning) == (text, "")
            tools = await chat.create(model="tiny", messages=ASK, tools=TOOLS, extra_body=together)
            assert tools.choices[0].message.content == text
        async with serving(models["qwen3"], text, reasoning_parser="none") as (chat, _, _):
            answer = await chat.create(model="tiny", messages=ASK)
            assert answer.choices[0].message.content == text

    run_async(main())


def test_thoughts_that_are_not_streamed_come_in_one_chunk(run_async, models):
    async def main():
        async with serving(models["qwen3"], "<think>Hm, so.</think>Yes.") as (_, _, plain):
            request = {"messages": ASK, "stream": True, "stream_reasoning": False}
            answer = await plain.post("/v1/chat/completions", json=request)
            assert answer.text.count("reasoning_content") == 1 and '"reasoning_content":"Hm, so."' in answer.text

    run_async(main())


def test_a_model_that_is_told_not_to_think_answers_with_plain_content(run_async, models):
    async def main():
        async with serving(models["qwen3"], "Yes <think>.") as (chat, scheduler, _):
            kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
            answer = await chat.create(model="tiny", messages=ASK, extra_body=kwargs)
            assert answer.choices[0].message.content == "Yes <think>."
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert prompt.endswith("<think>\n\n</think>\n\n")

    run_async(main())


def test_a_forced_call_may_come_after_thoughts(run_async, models):
    async def main():
        async with serving(models["qwen3"], "<think>Hm.</think>\n\n" + CALL) as (chat, scheduler, _):
            answer = await chat.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice="required")
            message = answer.choices[0].message
            assert message.reasoning_content == "Hm." and message.content is None
            assert message.tool_calls[0].function.name == "weather"
            grammar = scheduler.submits[0].sampling.grammar
            assert LLMatcher.validate_grammar(grammar, None) == "" and "thoughts" in grammar

    run_async(main())


# --- templates -------------------------------------------------------------------------------------------------------


def test_the_last_message_is_continued_where_that_is_wanted(run_async, models):
    async def main():
        async with serving(models["chatml"], " fine.") as (chat, scheduler, _):
            messages = [*ASK, {"role": "assistant", "content": "It is"}]
            await chat.create(model="tiny", messages=messages, extra_body={"continue_final_message": True})
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert prompt.endswith("<|im_start|>assistant\nIt is")

    run_async(main())


def test_a_template_given_by_flag_goes_before_the_models_own(run_async, models):
    async def main():
        template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ documents }}"
        async with serving(models["qwen3"], "<think>x", chat_template=template) as (chat, scheduler, _):
            messages = [{"role": "developer", "content": "D"}, *ASK]
            documents = [{"title": "T", "text": "x"}]
            answer = await chat.create(model="tiny", messages=messages, extra_body={"documents": documents})
            assert answer.choices[0].message.content == "<think>x", "this template knows no thoughts"
            prompt = tokenizer().decode(tokens_of(scheduler.submits[0]), skip_special_tokens=False)
            assert prompt == "[system]D[user]How is it in Köln?[{'title': 'T', 'text': 'x'}]"

    run_async(main())
