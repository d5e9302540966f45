"""The clients that people have, unchanged, against a whole cluster: Python's and npm's `openai`, and LangChain."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from up_kit import Running, running

from tests.replay import audit

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
QUESTION: list[Any] = [{"role": "user", "content": "What is 3 plus 4?"}]
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "enum": [3, 7]}, "b": {"type": "integer", "enum": [4]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


class Sum(pydantic.BaseModel):
    """What structured answers hold. Closed sets, so that a small model is soon done."""

    model_config = pydantic.ConfigDict(extra="forbid")

    first: Literal[3, 4]
    word: Literal["seven", "eight"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The built-in model; every prompt is computed by the prefill instance."""
    command = [sys.executable, "-m", "pd", "up", "--port", "0", "--log-format", "json", "--local-prefill", "never"]
    with running(command, tmp_path_factory.mktemp("cluster"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") as found:
        yield found
        assert audit(found.instance("decode-0"), 5.0)["balanced"]
        assert found.stop() == 0


@pytest.fixture(scope="module")
def client(cluster: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


# --- openai, Python --------------------------------------------------------------------------------------------------


def test_a_chat_answers_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=QUESTION, temperature=0)
    assert whole.choices[0].message.content == "3 + 4 = 7" and whole.choices[0].finish_reason == "stop"
    usage = whole.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            model="default", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "3 + 4 = 7"
    assert chunks[-1].usage == whole.usage


def test_several_choices_have_their_own_texts_and_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "messages": QUESTION, "n": 3, "seed": 7, "temperature": 2.0}
    whole = client.chat.completions.create(**asked, max_tokens=12, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1, "a temperature of 2 draws different ones"
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, max_tokens=12, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_completions_take_every_kind_of_prompt(client: openai.OpenAI) -> None:
    text = "The capital of France is"
    (choice,) = client.completions.create(model="default", prompt=text, max_tokens=8, temperature=0).choices
    assert choice.text == " Paris."
    several = client.completions.create(model="default", prompt=[text, text], max_tokens=8, temperature=0, n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3] and {c.text for c in several.choices} == {" Paris."}
    echo = client.completions.create(model="default", prompt=text, max_tokens=2, temperature=0, echo=True, logprobs=1)
    assert echo.choices[0].text.startswith(text)
    logprobs = echo.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None
    assert all(value is not None for value in logprobs.token_logprobs[1:])
    best = client.completions.create(model="default", prompt=text, max_tokens=8, best_of=4, seed=1)
    assert len(best.choices) == 1 and best.usage is not None and best.usage.completion_tokens > 8 // 2


def test_a_structured_answer_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="default", messages=QUESTION, response_format=Sum, temperature=0, max_tokens=600
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "messages": QUESTION, "tools": [ADD], "tool_choice": "required"}
    whole = client.chat.completions.create(**asked, temperature=0, max_tokens=200)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert arguments["a"] in (3, 7) and arguments["b"] == 4
    with client.chat.completions.stream(**asked, temperature=0, max_tokens=200) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls and streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


def test_errors_name_the_field_and_the_right_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="default", messages=QUESTION, temperature=1000)
    assert found.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=QUESTION)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="default", messages=QUESTION, response_format=schema)


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


# --- openai, npm -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def npm(cluster: Running) -> dict[str, Any]:
    """What tests/clients/chat.mjs saw."""
    node = shutil.which("node")
    folder = ROOT / "tests" / "clients"
    if node is None or not (folder / "node_modules").is_dir():
        pytest.skip("node, or what `make dev` installs with npm, is missing")
    done = subprocess.run([node, str(folder / "chat.mjs"), cluster.url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_npm_streams_a_chat(npm: dict[str, Any]) -> None:
    assert (npm["streamed"]["text"], npm["streamed"]["finish"]) == ("3 + 4 = 7", "stop")
    assert npm["streamed"]["usage"]["completion_tokens"] > 0
    assert npm["models"]


def test_npm_calls_tools_whole_and_streamed(npm: dict[str, Any]) -> None:
    for choice in (npm["toolCall"], npm["streamedToolCall"]["choice"]):
        assert choice["finish_reason"] == "tool_calls"
        call = choice["message"]["tool_calls"][0]["function"]
        assert call["name"] == "add" and json.loads(call["arguments"])["b"] == 4
    arguments = npm["streamedToolCall"]["choice"]["message"]["tool_calls"][0]["function"]["arguments"]
    assert "".join(npm["streamedToolCall"]["deltas"]) == arguments


def test_npm_may_leave_a_stream_and_gets_errors_of_its_own_kind(npm: dict[str, Any]) -> None:
    assert npm["aborted"] == 3
    assert npm["refused"] == {"name": "BadRequestError", "status": 400, "param": "temperature"}


# --- LangChain -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def langchain(cluster: Running) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", model="default", temperature=0, max_tokens=600, max_retries=0
    )


def test_langchain_chats_and_streams(langchain: Any) -> None:
    assert langchain.invoke("What is 3 plus 4?").content == "3 + 4 = 7"
    assert "".join(chunk.content for chunk in langchain.stream("What is 3 plus 4?")) == "3 + 4 = 7"


def test_langchain_gets_structured_answers_and_tool_calls(langchain: Any) -> None:
    for method in ("json_schema", "function_calling"):
        found = langchain.with_structured_output(Sum, method=method).invoke("What is 3 plus 4?")
        assert isinstance(found, Sum), method
    answer = langchain.bind_tools([ADD], tool_choice="any").invoke("What is 3 plus 4?")
    assert answer.tool_calls[0]["name"] == "add" and answer.tool_calls[0]["args"]["b"] == 4
