"""What only a child process finds wrong with a setting is said like any other mistake: one line, exit code 2."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest
from oracle import tiny_model
from up_kit import run

pytestmark = pytest.mark.process

PD = [sys.executable, "-m", "pd"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models"), tokenizer=True)


def said(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and the last line, which is for the user; the others are logs."""
    root = Path(__file__).parents[2]
    code, out, err = run([*PD, *words], folder, {"PYTHONPATH": str(root)})
    assert out == "" and "Traceback" not in err, err
    return code, err.splitlines()[-1]


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_pool_that_does_not_fit(model: str, tmp_path: Path, command: str) -> None:
    code, line = said([command, model, "--port", "0", "--max-total-tokens", "999999999999"], tmp_path)
    assert line.startswith("pd: --max-total-tokens: 999999999999 tokens need ") and code == 2


def test_a_cluster_whose_port_is_taken_starts_nothing(model: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, out, err = run(
            [*PD, "up", model, "--port", port], tmp_path, {"PYTHONPATH": str(Path(__file__).parents[2])}
        )
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"pd: --port: cannot listen on 127.0.0.1:{port}: ")


@pytest.mark.parametrize("command", ["serve", "up"])
@pytest.mark.parametrize(
    ("broken", "damage", "complaint"),
    [
        ("", "", "no such directory"),
        ("config.json", "", "config.json is missing"),
        ("model.safetensors", "", "no weights"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json cannot be read"),
        ("chat_template.jinja", "{% if %}", "chat template does not compile"),
        ("generation_config.json", '{"temperature": "hot"}', "generation_config.json cannot be read"),
    ],
)
def test_a_model_that_cannot_be_served(
    model: str, tmp_path: Path, command: str, broken: str, damage: str, complaint: str
) -> None:
    """`broken`: the file that it lacks, or that holds `damage`; "" for the whole directory."""
    folder = tmp_path / "model"
    if broken:
        shutil.copytree(model, folder)
        (folder / broken).unlink(missing_ok=True)
    if damage:
        (folder / broken).write_text(damage)
    code, out, err = run(
        [*PD, command, str(folder), "--port", "0"], tmp_path, {"PYTHONPATH": str(Path(__file__).parents[2])}
    )
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"pd: model {folder}: ") and complaint in err


@pytest.mark.parametrize(("flag", "more"), [("--port", ()), ("--control-port", ("--port", "0"))])
def test_a_port_that_is_taken(model: str, tmp_path: Path, flag: str, more: tuple[str, ...]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        control = () if flag == "--control-port" else ("--control-port", "0")
        small = ("--role", "prefill", "--max-total-tokens", "1024")
        code, line = said(["serve", model, flag, port, *more, *control, *small], tmp_path)
    assert line.startswith(f"pd: {flag}: cannot listen on 127.0.0.1:{port}: ") and code == 2
    assert "ddress already in use" in line
    if flag == "--control-port":
        assert "give each prefill instance of a host a port of its own (--disaggregation-bootstrap-port" in line


@pytest.mark.parametrize("command", ["serve", "route", "up"])
def test_a_certificate_that_is_not_there(model: str, tmp_path: Path, command: str) -> None:
    words = ["--decode", "http://127.0.0.1:1"] if command == "route" else [model]
    code, line = said([command, *words, "--port", "0", "--ssl-certfile", "absent.pem"], tmp_path)
    assert (code, line) == (2, "pd: --ssl-certfile: cannot read absent.pem: No such file or directory")
