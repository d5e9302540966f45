"""The kernels of sampling compiled for Hopper: they fit, nothing spills, and logits are read in wide accesses."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from pd.kernels.sampling_triton import SMALL_TILE, TILE, WARPS, best_pass, pick_pass
from tests.kernels.aot import compile_sm90

COLUMNS = {
    "temperatures": "*fp32:16",
    "seeds": "*i64:16",
    "choices": "*i32:16",
    "positions": "*i32:16",
    "picks": "*i32:16",
    "highs": "*fp32:16",
    "sums": "*fp32:16",
    "tokens": "*i32:16",
    "logprobs": "*fp32:16",
    "stride": "i32:16",
    "raw_stride": "i32",
    "vocab": "i32:16",
    "tiles": "i32",
}


@pytest.mark.parametrize("tile", [SMALL_TILE, TILE])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_the_pass_over_the_logits_fits(tile: int, dtype: str, logprobs: bool) -> None:
    constants = {"raw": None, "TILE": tile} | ({} if logprobs else dict.fromkeys(("highs", "sums")))
    compiled = compile_sm90(pick_pass, COLUMNS | {"logits": f"*{dtype}:16"}, constants, num_warps=WARPS[tile])
    compiled.check()
    columns = tile // (4 * 32 * WARPS[tile])
    assert compiled.count("LDG.E.64" if dtype == "bf16" else "LDG.E.128") >= columns
    assert compiled.count("LDG.E.U16") == 0
    # Philox: a 64-bit product per multiplication, whose first ones are those of a row.
    assert compiled.count("IMAD.WIDE.U32") >= 18 * columns
    assert compiled.count("MUFU.LG2") == 8 * columns, "two fast logarithms a token"


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_pass_over_the_picks_fits(logprobs: bool) -> None:
    constants = {"raw": None, "LANES": 128} | ({} if logprobs else dict.fromkeys(("highs", "sums", "logprobs")))
    compile_sm90(best_pass, COLUMNS | {"logits": "*bf16:16"}, constants).check()
