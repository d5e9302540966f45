"""Kernels compiled for Hopper, without a GPU: they fit, nothing spills, and memory is accessed 16 bytes at a time."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from pd.kernels.spans import TILE_ROWS, Form
from pd.kernels.spans_triton import ROWS, span_pass, span_share
from pd.runner.cuda_slices import widths
from tests.kernels.aot import Compiled, compile_sm90

WORDS = dict.fromkeys(("source", "target", "digests", "table", "members"), "*i64:16")

#: Arguments that are not given: what is then left of the pass.
ABSENT = {"copy": ["digests"], "digest": ["target"], "copy and digest": []}


def compile_pass(does: str, alignment: int) -> Compiled:
    constants = {"ROWS": ROWS, "ALIGNMENT": alignment} | dict.fromkeys(ABSENT[does])
    return compile_sm90(span_pass, WORDS | {"chunks": "i32"}, constants)


@pytest.mark.parametrize("does", ABSENT)
def test_the_pass_over_spans_fits_and_accesses_16_bytes_at_a_time(does: str) -> None:
    aligned, odd = compile_pass(does, 2), compile_pass(does, 1)
    for compiled in (aligned, odd):
        compiled.check()
        assert compiled.registers <= 80, "six programs of four warps on a multiprocessor"
        assert (compiled.count("STG") > 0) == ("copy" in does)
        assert (compiled.count("REDG") + compiled.count("RED") + compiled.count("ATOMG") > 0) == ("digest" in does)
    assert aligned.count("LDG.E.128") == ROWS * 64 // (128 * 2)
    assert odd.count("LDG.E.128") == 0
    assert aligned.count("STG.E.128") == (aligned.count("LDG.E.128") if "copy" in does else 0)


@pytest.mark.parametrize("form", sorted({width.form for width in widths(132).values()}, key=lambda form: form.rows))
def test_a_share_of_the_pass_fits_and_accesses_16_bytes_at_a_time(form: Form) -> None:
    for alignment in (2, 1):
        constants = {"TILE": TILE_ROWS, "ROWS": form.rows, "ALIGNMENT": alignment}
        types = {name: kind for name, kind in WORDS.items() if name != "members"}
        types |= dict.fromkeys(("count", "first", "last"), "i32")
        compiled = compile_sm90(span_share, types, constants, num_warps=form.warps)
        compiled.check()
        # Whole tiles, so many accesses of 16 bytes a thread, and tiles that are cut.
        wide = form.rows * 64 // (form.warps * 32 * 2) if alignment == 2 else 0
        assert compiled.count("LDG.E.128") == compiled.count("STG.E.128") == wide
        if alignment == 2:
            assert compiled.registers * form.warps * 32 <= 65536 // 2, "half a multiprocessor"
