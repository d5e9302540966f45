"""What a step makes of its rows, and the read that bandwidth is measured with, compiled for Hopper."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from pd.kernels.bandwidth_triton import TILE, read_kernel
from pd.kernels.step_rows_triton import ENTRIES, gather_sampling_kernel, prepare_rows_kernel, store_last_kernel
from tests.kernels.aot import Compiled, compile_sm90

WORDS = "*i32:16"


def fits(compiled: Compiled) -> None:
    """Threads share nothing, and a multiprocessor holds all that it can have."""
    compiled.check()
    assert compiled.registers <= 32 and compiled.shared == 0


@pytest.mark.parametrize("page", [1, 16, 32, 48])
def test_rows_are_prepared(page: int) -> None:
    state, rows = ("state_tables", "last"), ("slots", "lengths", "grown", "tables")
    signature = dict.fromkeys((*state, *rows, "tokens", "positions", "blocks", "offsets"), WORDS)
    signature |= dict.fromkeys(("width", "state_width", "decode", "scratch"), "i32")
    fits(compile_sm90(prepare_rows_kernel, signature, {"PAGE": page, "ENTRIES": ENTRIES}))


def test_sampling_parameters_are_gathered() -> None:
    signature = dict.fromkeys(("table", "slots", "lengths", "top_k", "choice", "position"), WORDS)
    signature |= dict.fromkeys(("temperature", "top_p", "min_p"), "*fp32:16") | {"seed": "*i64:16", "rows": "i32"}
    compiled = compile_sm90(gather_sampling_kernel, signature, {"ROWS": 128})
    fits(compiled)
    assert compiled.count("STG") == 7 and compiled.count("STG.E.64") == 1, "each parameter once, the seed in one piece"


def test_tokens_are_stored() -> None:
    signature = dict.fromkeys(("last", "slots", "tokens"), WORDS) | {"rows": "i32"}
    fits(compile_sm90(store_last_kernel, signature, {"ROWS": 128}))


def test_memory_is_read_16_bytes_at_a_time() -> None:
    compiled = compile_sm90(read_kernel, dict.fromkeys(("memory", "sums"), WORDS), {"TILE": TILE}, num_warps=8)
    compiled.check()
    assert compiled.registers <= 32
    assert compiled.count("LDG.E.128") == compiled.count("LDG") == TILE // (8 * 32 * 4)
    assert compiled.count("STG") == 1, "one sum"
