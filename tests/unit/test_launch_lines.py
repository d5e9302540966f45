"""SGLang's launch lines through pd's own command line: each starts, or is refused by the name of a flag."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from pd.cli import main
from pd.config import ServeConfig
from pd.instance import check, check_text
from pd.plugins import load_plugins
from pd.rules import builtin_model
from tests.launch_lines import LINES, Line


class Part(ModuleType):
    """Stands where an instance or a router would start; remembers what it would have started with."""

    config: Any = None

    def run(self, config: Any) -> int:
        self.config = config
        return 0


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """By command. This machine has no GPU, whatever it has."""
    monkeypatch.setattr("pd.cli.has_accelerator", lambda: False)
    found = {"serve": Part("pd.instance"), "route": Part("pd.router.service")}
    for part in found.values():
        monkeypatch.setitem(sys.modules, part.__name__, part)
    return found


def without(arguments: list[str], refused: str) -> list[str]:
    """The line without the flags that a refusal names, and without their values."""
    flags = [named.split()[0] for named in refused.split(", ")]
    kept: list[str] = []
    dropping = False
    for word in arguments:
        dropping = word in flags or (dropping and not word.startswith("--"))
        if not dropping:
            kept.append(word)
    return kept


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.number)
def test_a_line_starts_or_is_refused_by_the_name_of_what_is_not_available(
    line: Line, parts: dict[str, Part], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, arguments, environ = line.command(builtin_model())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for refused in line.refused:
        assert main([command, *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"pd: {refused}: ") and said.count("\n") == 1, said
        assert parts[command].config is None
        arguments = without(arguments, refused)
    assert main([command, *arguments]) == 0, capsys.readouterr().err
    config = parts[command].config
    for path, value in line.expected.items():
        found: Any = config
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path
    if isinstance(config, ServeConfig):
        check_text(check(config, load_plugins()))


def test_every_row_of_the_table_is_held() -> None:
    numbers = [line.number for line in LINES]
    assert len(set(numbers)) == len(numbers) == 27
    rows = {int(number.rstrip("abcd").partition("-")[0]) for number in numbers}
    assert rows == set(range(1, 15)) - {12}  # 12 is asked of a running cluster
