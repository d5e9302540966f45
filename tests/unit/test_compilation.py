"""A kernel that is compiled after start-up is told of by its name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pd.kernels.launch import watch_compilation

triton = pytest.importorskip("triton")


def test_a_compiled_kernel_is_told_of_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)
    told: list[str] = []
    watch_compilation(told.append)
    hook = triton.knobs.runtime.jit_post_compile_hook
    # As Triton's JIT calls it: with keywords, of which its releases have more and more.
    hook(
        key="k",
        repr="r",
        fn=SimpleNamespace(name="norm_kernel"),
        compile={},
        is_manual_warmup=False,
        already_compiled=True,
    )
    assert told == ["norm_kernel"]
