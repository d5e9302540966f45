"""The tool fields of a chat request, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pd.errors import RequestError

MAX_NAME = 256


@dataclass(frozen=True)
class Function:
    """`parameters` is a JSON schema of the arguments; None means that there are none."""

    name: str
    parameters: Mapping[str, Any] | None
    strict: bool


@dataclass(frozen=True)
class ToolWishes:
    """`tools` as the client sent them, for the template; `choice`: auto, required, or the name of a function."""

    tools: Sequence[Mapping[str, Any]]
    functions: tuple[Function, ...]
    choice: str = "auto"
    named: bool = False
    parallel: bool = True

    @property
    def forced(self) -> bool:
        return self.named or self.choice == "required"

    @property
    def constrained(self) -> bool:
        """Calls are held to a grammar: always, or once they are begun."""
        return self.forced or any(function.strict for function in self.functions)

    @property
    def names(self) -> frozenset[str]:
        """Of the functions that may be called."""
        return frozenset(function.name for _, function in self.callable())

    def callable(self) -> list[tuple[int, Function]]:
        """With their places in `tools`."""
        functions = list(enumerate(self.functions))
        return [(at, f) for at, f in functions if f.name == self.choice] if self.named else functions


def tool_wishes(tools: Any, choice: Any, parallel: bool | None) -> ToolWishes | None:
    """None where there are no tools, or none is to be called. Raises RequestError naming the field at fault."""
    if tools is not None and not isinstance(tools, list):
        raise RequestError("tools must be a list of functions", param="tools")
    functions = tuple(_function(tool, f"tools[{at}]") for at, tool in enumerate(tools or ()))
    seen: set[str] = set()
    for at, function in enumerate(functions):
        if function.name in seen:
            name = f"tools[{at}].function.name"
            raise RequestError(f"{name}: there are two functions named {function.name!r}", param=name)
        seen.add(function.name)
    word, named = _choice(choice)
    if word == "none" and not named:
        return None
    if not functions:
        if word != "auto" or named:
            raise RequestError("tool_choice asks for a call, but there are no tools", param="tool_choice")
        return None
    if named and word not in seen:
        raise RequestError(f"tool_choice names {word!r}, which is not among the tools", param="tool_choice")
    return ToolWishes(tuple(tools or ()), functions, word, named, parallel is not False)


def _choice(choice: Any) -> tuple[str, bool]:
    """(the word or the function's name, whether it is a name)."""
    if choice is None:
        return "auto", False
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        return choice, False
    if isinstance(choice, dict) and choice.get("type", "function") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return name, True
    raise RequestError(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}',
        param="tool_choice",
    )


def _function(tool: Any, where: str) -> Function:
    if not isinstance(tool, dict):
        raise RequestError(f"{where} must be an object", param=where)
    if tool.get("type", "function") != "function":
        raise RequestError(
            f"{where}.type must be 'function', got {tool['type']!r}",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object", param=f"{where}.function")
    name, parameters, strict = (function.get(key) for key in ("name", "parameters", "strict"))
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        problem = f"{where}.function.name must be a string of 1 to {MAX_NAME} characters"
        raise RequestError(problem, param=f"{where}.function.name")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(
            f"{where}.function.parameters must be a JSON schema, an object", param=f"{where}.function.parameters"
        )
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.function.strict must be a boolean", param=f"{where}.function.strict")
    return Function(name, parameters, bool(strict))
