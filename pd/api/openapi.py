"""/openapi.json: made of the route table and the types that the endpoints read and answer, so it cannot drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

import pd
from pd.access import OPEN_PATHS
from pd.api import answers
from pd.api.context import Context
from pd.api.params import neutral_values
from pd.api.ranges import narrow
from pd.api.routes import Route

_REF = "#/components/schemas/{name}"
_REQUESTS = ("Request", "Sampling")
_ERRORS = {
    "400": "a field is wrong or not supported; `param` names it",
    "401": "the API key is missing or wrong",
    "404": "the model does not exist",
    "413": "the body is too large",
    "415": "the body is not JSON",
    "501": "not built",
    "502": "a worker failed",
    "503": "not ready, overloaded, or the scheduler does not answer",
    "504": "the time is up",
}


_EVENT = {
    "type": "object",
    "description": "one server-sent event: a chunk as JSON, and at the end [DONE]; an error if it fails midway",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}


def document(routes: Sequence[Route], context: Context) -> dict[str, Any]:
    """What this instance takes and answers."""
    keyed = bool(context.access.api_key)
    types = [answers.ErrorAnswer, *(t for r in routes for t in (r.body, r.answer) if t is not None)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    found = dict(zip(map(repr, types), schemas, strict=True))
    for name, schema in components.items():
        _refuse(schema)
        if name.endswith(_REQUESTS):
            narrow(name, schema, context.served, context.limits)
    paths: dict[str, Any] = {}
    for route in routes:
        paths[route.path] = {method.lower(): _operation(route, method, found, keyed) for method in route.methods}
    components = dict(components)
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "pd", "version": pd.__version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        whole["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return whole


_ABOUT = "Unknown fields are accepted. A field that is known and not built is accepted with the values listed only."


def _refuse(schema: dict[str, Any]) -> None:
    """Of a field that is not built only the values that change nothing are accepted."""
    for name, field in schema.get("properties", {}).items():
        neutral = neutral_values(name)
        if neutral is not None and "anyOf" not in field and "type" not in field and "$ref" not in field:
            field["enum"] = [None, *neutral]
            field["description"] = "not built"


def _operation(route: Route, method: str, found: Mapping[str, Any], keyed: bool) -> dict[str, Any]:
    name = f"{method} {route.path}"
    operation: dict[str, Any] = {
        "operationId": "_".join(part for part in name.lower().replace("{", "").replace("}", "").split("/")).replace(
            " ", ""
        ),
        "summary": route.summary,
        "responses": _responses(route, found),
    }
    parameters: list[dict[str, Any]] = [
        {"name": key, "in": "query", "description": text, "schema": {"type": "string"}} for key, text in route.query
    ]
    if route.path.endswith("}"):
        key = route.path.partition("{")[2][:-1]
        parameters.append({"name": key, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}})
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": found[repr(route.body)]}}
        operation["requestBody"] = {"required": not route.optional_body, "content": content}
    if keyed and route.path not in OPEN_PATHS:
        operation["security"] = [{"key": []}]
    return operation


def _responses(route: Route, found: Mapping[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": found[repr(answers.ErrorAnswer)]}}
    responses = {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    if route.answer is None:
        return responses | {"200": {"description": "text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    content: dict[str, Any] = {"application/json": {"schema": found[repr(route.answer)]}}
    if route.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    return responses | {"200": {"description": "done", "content": content}}
