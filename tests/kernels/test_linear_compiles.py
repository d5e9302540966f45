"""The projections' kernels compiled for Hopper: nothing spills, the matrix unit is used, and blocks fit."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from pd.kernels import linear_triton
from pd.kernels.linear_configs import ONE_ROW, TABLE, Row, Stream
from tests.kernels.aot import Compiled, compile_sm90

POINTERS = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16:16")
SIZES = dict.fromkeys(("n", "k", "x_stride", "out_stride"), "i32:16") | dict.fromkeys(("rows", "prefetch"), "i32")

#: Rows of x, configuration, whether programs share blocks.
STREAMS = [
    (16, Stream(64, 256, 4, 4, pdl=True), True),
    (16, Stream(64, 256, 3, 4, tma=True), True),
    (64, Stream(128, 128, 3, 8), True),
]
for (n, k), entries in TABLE.items():
    STREAMS += [(max(16, most), one, linear_triton.shares(one, n, k, 132)[1]) for most, one in entries]
ROWS = [(4096, ONE_ROW), (14336, ONE_ROW), (14336, Row(4, 1024, 4))]


def compile_stream(rows: int, config: Stream, divided: bool) -> Compiled:
    types = POINTERS | SIZES | {"partial": "*fp32:16", "arrivals": "*i32:16"}
    constants: dict[str, Any] = {"bias": None, "EVEN": True, "PDL": config.pdl, "EARLY": config.early}
    constants |= {"ROWS": rows, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "DIVIDED": divided}
    if config.tma:
        types["x_tiles"] = f"tensordesc<bf16[{rows},{config.block_k}]>"
        types["weight_tiles"] = f"tensordesc<bf16[{config.block_n},{config.block_k}]>"
    else:
        constants |= dict.fromkeys(("x_tiles", "weight_tiles"))
    if not divided:
        constants |= dict.fromkeys(("partial", "arrivals"))
    return compile_sm90(linear_triton.stream, types, constants, config.warps, config.stages)


@pytest.mark.parametrize("rows,config,divided", STREAMS, ids=str)
def test_a_stream_of_tiles_is_the_wide_operand_of_wgmma(rows: int, config: Stream, divided: bool) -> None:
    compiled = compile_stream(rows, config, divided)
    compiled.check()
    assert compiled.count("HGMMA") > 0
    assert (compiled.count("UTMALDG") > 0) == config.tma
    assert (compiled.count("LDGSTS") > 0) != config.tma, "tiles come 16 bytes at a time, past the registers"
    assert compiled.count("LDGSTS") == compiled.count("LDGSTS.E.BYPASS.128")
    assert (compiled.count("ACQBULK") > 0) == (compiled.count("PREEXIT") > 0) == config.pdl


@pytest.mark.parametrize("k,config", ROWS, ids=str)
def test_a_single_row_reads_16_bytes_at_a_time_before_it_waits(k: int, config: Row) -> None:
    constants = {"bias": None, "K": k, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "EVEN": True}
    constants |= {"PDL": config.pdl, "EARLY": config.early}
    compiled = compile_sm90(linear_triton.row, POINTERS | SIZES, constants, config.warps)
    compiled.check()
    wide = compiled.count("LDG.E.128") + compiled.count("LDG.E.EF.128") + compiled.count("LDG.E.EL.128")
    assert wide == compiled.count("LDG") > 0
    assert (compiled.count("ACQBULK") > 0) == config.pdl
    if config.pdl:
        assert compiled.sass.index("LDG.") < compiled.sass.index("ACQBULK")
