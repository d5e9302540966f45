"""/openapi.json describes what is accepted and answered: held against the code, and attacked by schemathesis."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import hypothesis
import jsonschema_rs
import msgspec
import pytest
import requests
import schemathesis
from api_kit import encode, serving
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pd.api.app import App
from pd.api.params import neutral_values
from pd.testing import tiny_tokenizer
from pd.testing.scripted_scheduler import Reply

pytestmark = pytest.mark.process

METRICS: dict[str, object] = {"kv_blocks": {"free": 1}}
GENERATING = ("/v1/completions", "/v1/chat/completions", "/generate")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An instance on a loop of its own thread, whose scheduler answers at once."""
    model = tiny_tokenizer.write(tmp_path_factory.mktemp("model"))
    ready, stop, found = threading.Event(), threading.Event(), []
    failures: list[BaseException] = []

    async def main() -> None:
        async with serving(model, lambda submit: Reply(tokens=encode("Hello")), bound_s=600) as at:
            at.scheduler.answers["metrics"] = METRICS
            found.append(f"http://127.0.0.1:{at.port}")
            ready.set()
            while not stop.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    yield found[0]
    stop.set()
    thread.join(10)
    assert not failures, failures


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    answer = requests.get(f"{url}/openapi.json", timeout=10)
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


def test_the_description_has_every_route_with_its_methods_and_no_other(document: dict[str, Any]) -> None:
    routes = {route.path: {m.lower() for m in route.methods} for route in App(_nothing(), print).table.routes}
    assert {path: set(item) for path, item in document["paths"].items()} == routes
    assert document["openapi"].startswith("3.1")
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)


def test_every_reference_leads_to_a_schema(document: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], reference


def test_every_described_field_is_one_that_is_read(document: dict[str, Any]) -> None:
    """As the decoders see it: a described field of a wrong type is refused by name, an unknown one is not."""
    checked = 0
    for route in App(_nothing(), print).table.routes:
        if route.body is None:
            continue
        described = document["components"]["schemas"][route.body.__name__]["properties"]
        assert set(described) == set(route.body.__struct_encode_fields__)
        for name, schema in described.items():
            wanted = neutral_values(name)
            if wanted is not None and "enum" in schema:
                assert schema["enum"] == [None, *wanted], "of a field that is not built only what changes nothing"
            checked += 1
    assert checked > 150


def _nothing() -> Any:
    """A context of which only the existence matters."""
    return MagicMock()


#: A request of each kind, its answer as described.
ASKED: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/completions", {"prompt": "a", "logprobs": 1, "echo": True, "return_token_ids": True}),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "prompt_logprobs": 1}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
    ("POST", "/generate", {"text": "a", "return_logprob": True}),
    ("POST", "/generate", {"text": ["a", "b"], "sampling_params": [{"top_k": 1}, {"top_k": 2}]}),
    ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("POST", "/v1/tokenize", {"prompt": ["a", "b"], "return_token_strs": True}),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("POST", "/v1/detokenize", {"tokens": [[5], [6]]}),
    ("POST", "/abort_request", {"rid": "x"}),
    ("POST", "/pause_generation", {"mode": "in_place"}),
    ("POST", "/continue_generation", None),
    ("POST", "/start_profile", {"activities": ["CPU"], "num_steps": "3", "output_dir": "/tmp/x"}),
    ("GET", "/stop_profile", None),
    *[
        ("GET", path, None)
        for path in (
            "/v1/models", "/v1/models/{model}", "/health", "/health_generate", "/server_info", "/get_server_info",
            "/model_info", "/get_model_info", "/version", "/v1/loads", "/loads", "/get_load", "/flush_cache",
            "/openapi.json",
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), ASKED)
def test_an_answer_has_the_described_form_and_nothing_else(
    url: str, document: dict[str, Any], method: str, path: str, body: dict[str, Any] | None
) -> None:
    answer = requests.request(method, url + path.replace("{model}", "tiny"), json=body, timeout=10)
    assert answer.status_code == 200, answer.text
    schema = document["paths"][path][method.lower()]["responses"]["200"]["content"]["application/json"]["schema"]
    strict = msgspec.json.decode(msgspec.json.encode(document["components"]["schemas"]))
    for component in strict.values():
        if "properties" in component:
            component["additionalProperties"] = False
    jsonschema_rs.validate({**schema, "components": {"schemas": strict}}, answer.json())


def test_every_route_with_a_described_answer_is_asked(document: dict[str, Any]) -> None:
    described = {
        path
        for path, item in document["paths"].items()
        if any("application/json" in op["responses"]["200"]["content"] for op in item.values())
    }
    assert described == {path for _, path, _ in ASKED}


def test_errors_have_the_described_form(url: str, document: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/ErrorAnswer", "components": document["components"]}
    for path, body in (
        ("/v1/completions", {}),
        ("/tokenize", {}),
        ("/v1/models/other", None),
    ):
        answer = requests.request("POST" if body is not None else "GET", url + path, json=body, timeout=10)
        assert answer.status_code >= 400
        jsonschema_rs.validate(schema, answer.json())


@pytest.fixture(scope="module")
def described(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [(route.path, method) for route in App(_nothing(), print).table.routes for method in route.methods]


def attack(described: Any, url: str, path: str, method: str, examples: int) -> None:
    """Whatever the description allows or forbids: no server error, and every answer as described."""
    session = requests.Session()

    def ask(case: Any) -> None:
        response = case.call(session=session, timeout=10)
        if path == "/pause_generation" and response.status_code == 200:
            session.post(f"{url}/continue_generation", timeout=10).raise_for_status()
        case.validate_response(response, checks=CHECKS)

    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        operation = described[path][method]
        if mode is schemathesis.GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing can be wrong
        settings = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        settings(hypothesis.given(case=operation.as_strategy(generation_mode=mode))(ask))()
    session.close()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_nothing_that_is_asked_is_a_server_error(described: Any, url: str, path: str, method: str) -> None:
    attack(described, url, path, method, 25)


@pytest.mark.parametrize("path", GENERATING)
def test_a_stream_has_the_described_form(described: Any, url: str, path: str) -> None:
    operation = described[path]["POST"]
    case = operation.Case(body={**BASE[path], "stream": True}, media_type="application/json")
    response = case.call(timeout=10)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(response, checks=CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), [o for o in OPERATIONS if o[1] == "POST"])
def test_nothing_that_is_asked_hundreds_of_times_is_a_server_error(
    described: Any, url: str, path: str, method: str
) -> None:
    attack(described, url, path, method, 400)


# --- ranges ----------------------------------------------------------------------------------------------------------


def _ends(schema: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(the last value that a numeric range has, the first beyond it), at either end."""
    step = 1 if schema["type"] == "integer" else 1e-6
    for name, sign in (("minimum", -1), ("maximum", 1)):
        if name in schema:
            yield schema[name], schema[name] + sign * max(step, step * abs(schema[name]) * (step < 1))
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"] + step, schema["exclusiveMinimum"]


#: What else a field needs to be accepted at all. `n` above 1 and long outputs are other limits' business.
BESIDES: dict[str, dict[str, Any]] = {
    "max_tokens": {"echo": True},
    "top_logprobs": {"logprobs": True},
    "logprob_start_len": {"return_logprob": True},
    "bootstrap_port": {"bootstrap_host": "h", "bootstrap_room": 1},
}
BASE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/generate": {"text": "abc"},
}


@pytest.mark.parametrize("path", BASE)
def test_a_described_range_is_the_one_that_is_checked(url: str, document: dict[str, Any], path: str) -> None:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    checked: set[str] = set()
    with requests.Session() as session:

        def status(field: str, value: Any) -> int:
            asked = {**BASE[path], **BESIDES.get(field, {}), field: value}
            if field == "max_tokens" and path != "/v1/completions":
                asked.pop("echo")
            return session.post(url + path, json=asked, timeout=10).status_code

        for field, schema in described.items():
            for form in schema.get("anyOf", [schema]):
                if form.get("type") not in ("integer", "number"):
                    continue
                for last, beyond in _ends(form):
                    if not (field == "n" and last > 1):
                        assert status(field, last) == 200, (field, last)
                    assert status(field, beyond) == 400, (field, beyond)
                    checked.add(field)
    assert len(checked) > 12


@pytest.mark.parametrize(
    ("path", "field", "good", "bad"),
    [
        ("/v1/completions", "prompt", ["a"], []),
        ("/v1/completions", "prompt", [0, 1], [0, "a"]),
        ("/v1/completions", "prompt", [[0]], [[]]),
        ("/v1/completions", "stop", ["a"] * 64, ["a"] * 65),
        ("/v1/completions", "stop", "a" * 1024, "a" * 1025),
        ("/v1/completions", "stop_token_ids", [0], [-1]),
        ("/v1/completions", "logit_bias", {"5": 100}, {"5": 101}),
        ("/v1/completions", "logit_bias", {"5": -100}, {"x": 1}),
        ("/v1/completions", "model", "default", "other"),
        ("/v1/completions", "truncate_prompt_tokens", -1, 0),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": [{"type": "text", "text": "a"}]}], []),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "a", "name": "x"}], [{"role": "user"}]),
        ("/generate", "stop", ["a"] * 64, ["a"] * 65),
        ("/generate", "token_ids_logprob", [0], [1 << 20]),
        ("/generate", "token_ids_logprob", [[0]], [[0], 1]),
    ],
)
def test_a_described_form_is_the_one_that_is_checked(
    url: str, document: dict[str, Any], path: str, field: str, good: Any, bad: Any
) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**schema, "components": document["components"]})
    for value, accepted in ((good, True), (bad, False)):
        body = {**BASE[path], field: value}
        if field == "token_ids_logprob":
            body["return_logprob"] = True
        answer = requests.post(url + path, json=body, timeout=10)
        assert (answer.status_code == 200) is accepted, answer.text
        assert validator.is_valid(body) is accepted, body
