"""The program that runs every kernel under a sanitizer on a GPU does so here, in its shorter cases."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import sanitize


@pytest.mark.parametrize("name", ["bandwidth", "norms", "activation", "rotation", "shaping", "step-rows"])
def test_a_case_of_the_sanitizer_computes_what_the_reference_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "DEVICE", torch.device("cpu"))
    sanitize.CASES[name]()
