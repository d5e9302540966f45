"""Runs the tests of `interpreted` in processes of their own, in which Triton interprets its kernels on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_kernels_compute_what_their_references_do(file: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
