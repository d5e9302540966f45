"""The command line as a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pd

pytestmark = pytest.mark.process


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)


def test_importing_the_command_line_loads_neither_torch_nor_zmq_nor_a_web_framework() -> None:
    code = "import sys, pd.cli; print([m for m in ('torch', 'zmq', 'starlette', 'uvicorn') if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


def test_the_package_runs_as_a_module() -> None:
    result = run("-m", "pd", "--version")
    assert (result.returncode, result.stdout) == (0, f"pd {pd.__version__}\n")


def test_a_wrong_call_is_one_line_on_stderr_and_exit_code_2() -> None:
    result = run("-m", "pd", "serve", "/m", "--no-such-flag")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "--no-such-flag" in result.stderr
