"""Norms, gated activation and rotation compiled for Hopper: 16 bytes at a time, and what is read before the wait."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from pd.kernels.activation_triton import WARPS, block_of, silu_mul_kernel
from pd.kernels.norm_triton import norm_kernel, scale_kernel, warps
from pd.kernels.rope_triton import rope_tables_kernel, rope_write_kernel, tile
from tests.kernels.aot import MAX_SHARED, Compiled, compile_sm90

BF16, F32 = "*bf16:16", "*fp32:16"


def before_the_wait(compiled: Compiled) -> int:
    """Loads before the wait for the kernel before; nothing is stored there."""
    accesses = re.findall(r"\b(LDG|STG|ACQBULK)\b", compiled.sass)
    assert accesses.count("ACQBULK") == compiled.count("PREEXIT") == 1
    before = accesses[: accesses.index("ACQBULK")]
    assert "STG" not in before
    return len(before)


def accesses_16_bytes(compiled: Compiled, loads: int, stores: int) -> None:
    assert compiled.count("LDG.E.128") == loads
    assert compiled.count("STG.E.128") == compiled.count("STG") == stores


@pytest.mark.parametrize("columns", [4096, 5120])
def test_scales_of_norms(columns: int) -> None:
    block = 8192 if columns == 5120 else columns
    signature = {"x": BF16, "out": F32, "stride": "i32:16", "eps": "fp32"}
    compiled = compile_sm90(
        scale_kernel, signature, {"COLUMNS": columns, "BLOCK": block, "PDL": True}, num_warps=warps(block)
    )
    compiled.check()
    assert compiled.registers <= 32, "all 2,048 threads of a multiprocessor"
    assert compiled.count("LDG.E.128") == compiled.count("LDG") == 2
    assert before_the_wait(compiled) == 0


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("columns", [4096, 5120])
def test_norms(columns: int, added: bool, gained: bool) -> None:
    block = 8192 if columns == 5120 else columns
    signature = dict.fromkeys(("x", "residual", "weight", "out"), BF16)
    signature |= {"x_stride": "i32:16", "residual_stride": "i32:16", "eps": "fp32"}
    constants: dict[str, Any] = {"COLUMNS": columns, "BLOCK": block, "PDL": True}
    if not added:
        constants["residual"] = None
    if not gained:
        constants["weight"] = None
    compiled = compile_sm90(norm_kernel, signature, constants, num_warps=warps(block))
    compiled.check()
    assert compiled.registers <= 64, "all 2,048 threads of a multiprocessor but half"
    accesses_16_bytes(compiled, 2 + 2 * added + 2 * gained, 4 if added else 2)
    assert before_the_wait(compiled) == 2 * gained, "the weight"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [1, 8192])
def test_the_gated_activation(rows: int, scaled: bool) -> None:
    signature = {"gate_up": BF16, "scale": F32, "out": BF16, "stride": "i32:16"}
    constants: dict[str, Any] = {"COLUMNS": 14336, "BLOCK": block_of(rows), "PDL": True}
    if not scaled:
        constants["scale"] = None
    compiled = compile_sm90(silu_mul_kernel, signature, constants, num_warps=WARPS)
    compiled.check()
    assert compiled.registers <= 32, "all 2,048 threads of a multiprocessor"
    assert compiled.count("LDG.E.128") == (2 if rows == 1 else 4)
    assert compiled.count("LDG") == compiled.count("LDG.E.128") + scaled
    assert compiled.count("STG.E.128") == compiled.count("STG") == (1 if rows == 1 else 2)
    assert before_the_wait(compiled) == 0


def compile_rotation(
    q_heads: int, kv_heads: int, head_dim: int, normed: bool, scaled: bool, cache: str = BF16
) -> Compiled:
    signature = {
        "scale": F32,
        "cos": F32,
        "sin": F32,
        "eps": "fp32",
        "blocks": "*i32",
        "offsets": "*i32",
        "stride": "i32:16",
    }
    signature |= dict.fromkeys(("qkv", "q_gain", "k_gain"), BF16) | dict.fromkeys(("k_cache", "v_cache"), cache)
    for of in "kv":
        signature |= {f"{of}_block": "i64:16", f"{of}_head": "i32:16", f"{of}_token": "i32:16"}
        signature |= {f"{of}_scale": "fp32", f"{of}_inverse": "fp32"}
    pairs = head_dim // 2
    block, heads, num_warps = tile(q_heads, pairs)
    constants: dict[str, Any] = {"Q_HEADS": q_heads, "KV_HEADS": kv_heads, "PAIRS": pairs, "BLOCK": block}
    constants |= {"HEADS": heads, "k_dim": 1, "v_dim": 1, "PDL": True}
    if not normed:
        constants |= {"q_gain": None, "k_gain": None}
    if not scaled:
        constants["scale"] = None
    return compile_sm90(rope_write_kernel, signature, constants, num_warps=num_warps)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 8, 64), (16, 8, 128), (14, 2, 64)])
def test_rotation(q_heads: int, kv_heads: int, head_dim: int, normed: bool, scaled: bool) -> None:
    compiled = compile_rotation(q_heads, kv_heads, head_dim, normed, scaled)
    compiled.check()
    assert compiled.registers <= 64 and compiled.shared == 0, "threads share nothing but by shuffles"
    assert compiled.count("LDG.E.128") == (8 if normed else 6)
    assert compiled.count("LDG") == compiled.count("LDG.E.128") + 2 + scaled, "and the slot"
    stores = compiled.count("STG.E.128") - 2 * scaled  # values are written back, too
    assert compiled.count("STG.E.128") == compiled.count("STG") and stores in (4, 6), "keys, queries in 1 or 2 branches"
    assert before_the_wait(compiled) == (2 if normed else 0), "the weights of the norm"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64)])
def test_rotation_with_a_one_byte_cache(q_heads: int, kv_heads: int, head_dim: int, scaled: bool) -> None:
    compiled = compile_rotation(q_heads, kv_heads, head_dim, False, scaled, "*fp8e4nv:16")
    compiled.check()
    assert compiled.registers <= 64 and compiled.shared == 0
    assert compiled.count("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C") == 2 * 2 * 4, "two at a time, of keys and values"
    assert compiled.count("STG.E.64") == 4 and compiled.count("STG.E.64") + compiled.count("STG.E.128") == (
        compiled.count("STG")
    ), "eight bytes of each half of keys and values"


@pytest.mark.parametrize("pairs", [32, 64])
def test_tables_of_rotation(pairs: int) -> None:
    """Triton 3.6's libdevice reduces angles above 105,615 in local memory, which is never reached below."""
    signature = {"positions": "*i32", "frequencies": F32, "cos": F32, "sin": F32, "scale": "fp32"}
    constants = {"PAIRS": pairs, "BLOCK": pairs, "PDL": True}
    compiled = compile_sm90(rope_tables_kernel, signature, constants, num_warps=1)
    assert compiled.registers <= 32 and compiled.shared <= MAX_SHARED
    assert before_the_wait(compiled) == 1, "the frequencies"
