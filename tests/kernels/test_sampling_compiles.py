"""The kernels of sampling compiled for Hopper: they fit, nothing spills, and logits are read in wide accesses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from pd.kernels.cuts_triton import CHUNK, CUT_WARPS, FEW, SURVEY_TILE, SURVEY_WARPS, cut_pass, survey_pass
from pd.kernels.sampling_triton import BEST_WARPS, SMALL_TILE, TILE, WARPS, best_pass, pick_pass
from pd.kernels.shaping import MOST_COUNTED
from pd.kernels.shaping_triton import ENTRIES, OPTIONS, bias_pass, count_pass, mask_pass, penalty_pass
from pd.kernels.shaping_triton import TILE as SHAPING_TILE
from tests.kernels.aot import compile_sm90

COLUMNS = {
    "temperatures": "*fp32:16",
    "top_ks": "*i32:16",
    "top_ps": "*fp32:16",
    "min_ps": "*fp32:16",
    "seeds": "*i64:16",
    "choices": "*i32:16",
    "positions": "*i32:16",
    "cuts": "*fp32:16",
    "last_ties": "*i32:16",
    "picks": "*i32:16",
    "highs": "*fp32:16",
    "lows": "*fp32:16",
    "sums": "*fp32:16",
    "counts": "*i32:16",
    "few": "*i32:16",
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
@pytest.mark.parametrize("restricted", [False, True])
def test_the_pass_over_the_logits_fits(tile: int, dtype: str, logprobs: bool, restricted: bool) -> None:
    absent = ([] if logprobs else ["highs", "sums"]) + ([] if restricted else ["cuts", "last_ties"])
    constants = {"raw": None, "TILE": tile} | dict.fromkeys(absent)
    compiled = compile_sm90(pick_pass, COLUMNS | {"logits": f"*{dtype}:16"}, constants, num_warps=WARPS[tile])
    compiled.check()
    columns = tile // (4 * 32 * WARPS[tile])
    assert compiled.count("LDG.E.64" if dtype == "bf16" else "LDG.E.128") >= columns
    assert compiled.count("LDG.E.U16") == 0
    # Philox: nearly all of the 18 products that differ by column are one instruction.
    assert compiled.count("IMAD.WIDE.U32") >= 16 * columns
    assert compiled.count("MUFU.LG2") == 8 * columns, "two fast logarithms a token"


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_pass_over_the_picks_fits(logprobs: bool) -> None:
    constants = {"raw": None, "LANES": 128} | ({} if logprobs else dict.fromkeys(("highs", "sums", "logprobs")))
    compile_sm90(best_pass, COLUMNS | {"logits": "*bf16:16"}, constants, num_warps=BEST_WARPS).check()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_passes_that_find_cuts_fit(dtype: str) -> None:
    types = COLUMNS | {"logits": f"*{dtype}:16"}
    compile_sm90(survey_pass, types, {"TILE": SURVEY_TILE}, num_warps=SURVEY_WARPS).check()
    compiled = compile_sm90(cut_pass, types, {"LANES": 32, "CHUNK": CHUNK, "FEW": FEW}, num_warps=CUT_WARPS)
    compiled.check()
    assert compiled.registers <= 128, "a program of 16 warps"
    one_by_one = 3 * FEW // (32 * CUT_WARPS)  # what was gathered, in either search and at the end
    assert compiled.count("LDG.E.U16") == (one_by_one if dtype == "bf16" else 0)
    assert compiled.count("LDG.E.128") > 0


INTEGERS = dict.fromkeys(("stride", "counts_stride", "vocab"), "i32:16") | dict.fromkeys(
    ("seen_stride", "mask_stride", "words", "entries"), "i32"
)
LISTS = dict.fromkeys(("slots", "tokens", "seen", "masks"), "*i32:16") | {"counts": "*i16:16"}
REALS = dict.fromkeys(("repetitions", "frequencies", "presences", "values"), "*fp32:16")


@pytest.mark.parametrize("kernel", [penalty_pass, bias_pass, mask_pass, count_pass], ids=lambda kernel: kernel.__name__)
def test_the_passes_that_shape_logits_fit(kernel: Any) -> None:
    types = {"logits": "*fp32:16"} | LISTS | REALS | INTEGERS
    types["rows"] = "i32" if kernel is count_pass else "*i32:16"  # their number there, else which
    tile = {"TILE": SHAPING_TILE} if kernel in (penalty_pass, mask_pass) else {"ENTRIES": ENTRIES}
    tile |= {"MOST": MOST_COUNTED} if kernel is count_pass else {}
    compiled = compile_sm90(kernel, types, tile, num_warps=OPTIONS["num_warps"])
    compiled.check()
    if kernel is penalty_pass:
        assert compiled.count("LDG.E.128") == 3 * SHAPING_TILE // (8 * 128), "eight logits in two, their counts in one"
