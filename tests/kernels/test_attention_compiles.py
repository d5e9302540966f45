"""Attention as the engine launches it for Llama-3.1-8B (bfloat16, blocks of 32 tokens), compiled for Hopper."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch

from pd.kernels.attention_plan import tile_tokens
from pd.kernels.attention_prefill_triton import SLICE, combine_tile, prompt_config, prompt_tile
from pd.kernels.attention_triton import CHUNK, combine_parts, decode_config, decode_part
from tests.kernels.aot import Compiled, compile_sm90

FP8 = "fp8e4nv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSORS = ("q", "k", "v", "out")
STRIDES = dict.fromkeys(("q_row", "q_head", "block_stride", "head_stride", "token_stride"), "i32:16")


def compile_decode(
    dtype: str = "bf16", head_dim: int = 128, absent: tuple[str, ...] = (), cache: str = "", **constants: int
) -> Compiled:
    config = decode_config(DTYPES[dtype], head_dim, cache == FP8)
    signature = (
        dict.fromkeys(TENSORS, f"*{dtype}:16")
        | dict.fromkeys("kv", f"*{cache or dtype}:16")
        | STRIDES
        | {"partial": "*fp32:16", "scales": "*fp32:16", "arrivals": "*i32", "tables": "*i32", "lengths": "*i32"}
        | {"table_stride": "i32", "scale": "fp32", "v_scale": "fp32", "least": "i32"}
    )
    shape = {"GROUP": 4, "DIM": head_dim, "PAGE": 32, "STEP": config.step, "WINDOW": 0, "CHUNK": CHUNK}
    precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    return compile_sm90(
        decode_part, signature, shape | precision | constants | dict.fromkeys(absent), config.warps, config.stages
    )


@pytest.mark.parametrize("absent", [(), ("arrivals",), ("partial", "scales", "arrivals")], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_uses_tensor_cores_and_leaves_room_for_four_programs(head_dim: int, absent: tuple[str, ...]) -> None:
    compiled = compile_decode(head_dim=head_dim, absent=absent)
    compiled.check()
    assert compiled.count("HMMA") > 0
    assert compiled.count("LDGSTS.E.BYPASS.LTC128B.128") + compiled.count("LDGSTS.E.BYPASS.128") >= head_dim // 4
    assert compiled.shared <= (227 << 10) // 4 and compiled.registers <= 65536 // (4 * 128)


@pytest.mark.parametrize("absent", [(), ("partial", "scales", "arrivals")], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_byte_caches_are_read_16_bytes_at_a_time_and_never_byte_by_byte(
    head_dim: int, absent: tuple[str, ...]
) -> None:
    compiled = compile_decode(head_dim=head_dim, absent=absent, cache=FP8)
    compiled.check()
    assert compiled.count("HMMA") > 0 and compiled.count("LDS.U8") == compiled.count("LDG.E.U8") == 0
    assert compiled.count("F2FP.F16.E4M3.UNPACK_B") >= head_dim // 2, "two at a time"
    assert compiled.count("F2F") == 0, "no way round by other types"
    assert compiled.count("LDGSTS.E.BYPASS.LTC128B.128") + compiled.count("LDGSTS.E.BYPASS.128") >= head_dim // 8
    assert compiled.shared <= (227 << 10) // 5 and compiled.registers <= 65536 // (5 * 128), "five programs"


@pytest.mark.parametrize(
    "variant",
    [
        {"cache": FP8, "dtype": "fp32"},
        {"cache": FP8, "dtype": "fp16"},
        {"cache": FP8, "head_dim": 256},
        {"cache": FP8, "head_dim": 96},
        {"cache": FP8, "WINDOW": 4096},
        {"cache": FP8, "GROUP": 7},
        {"cache": FP8, "PAGE": 16},
        {"dtype": "fp16"},
        {"dtype": "fp32"},
        {"head_dim": 256},
        {"head_dim": 96},
        {"WINDOW": 4096},
        {"GROUP": 7},
        {"PAGE": 16},
        {"PAGE": 128},
        {"dtype": "fp32", "head_dim": 256},
    ],
    ids=str,
)
def test_decode_fits_for_other_models(variant: dict[str, int | str]) -> None:
    compile_decode(**variant).check()  # type: ignore[arg-type]


def test_the_combination_fits() -> None:
    signature = dict.fromkeys(("partial", "scales"), "*fp32:16") | {"out": "*bf16:16", "lengths": "*i32"}
    shape = {"GROUP": 4, "DIM": 128, "STEP": 64, "WINDOW": 0, "CHUNK": CHUNK}
    compile_sm90(combine_parts, signature | {"splits": "i32", "least": "i32"}, shape).check()


def compile_prompt(
    dtype: str = "bf16",
    head_dim: int = 128,
    absent: tuple[str, ...] = ("partial", "scales"),
    cache: str = "",
    **constants: int,
) -> Compiled:
    config = prompt_config(DTYPES[dtype], head_dim, cache == FP8)
    signature = (
        dict.fromkeys(TENSORS, f"*{dtype}:16")
        | dict.fromkeys("kv", f"*{cache or dtype}:16")
        | STRIDES
        | dict.fromkeys(("tables", "lengths", "starts", "tiles"), "*i32")
        | {"partial": "*fp32:16", "scales": "*fp32:16"}
        | {"table_stride": "i32", "decode": "i32", "scale": "fp32", "v_scale": "fp32", "least": "i32"}
    )
    group = constants.get("GROUP", 4)
    shape = {"GROUP": group, "DIM": head_dim, "PAGE": 32, "WINDOW": 0}
    tiles = {"TILE": tile_tokens(group), "ROWS": config.rows, "STEP": config.step}
    precision = {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    given = shape | tiles | precision | constants | dict.fromkeys(absent)
    return compile_sm90(prompt_tile, signature, given, config.warps, config.stages)


@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize(("head_dim", "absent"), [(64, ("partial", "scales")), (128, ("partial", "scales")), (128, ())])
def test_prompts_use_the_tensor_cores_of_warp_groups(head_dim: int, absent: tuple[str, ...], window: int) -> None:
    compiled = compile_prompt(head_dim=head_dim, absent=absent, WINDOW=window)
    compiled.check()
    assert compiled.count("HGMMA") > 0 and compiled.count("HMMA") == 0
    assert compiled.count("LDGSTS.E.BYPASS.LTC128B.128") + compiled.count("LDGSTS.E.BYPASS.128") >= head_dim // 8


@pytest.mark.parametrize("absent", [("partial", "scales"), ()], ids=str)
def test_prompts_read_one_byte_caches_16_bytes_at_a_time(absent: tuple[str, ...]) -> None:
    compiled = compile_prompt(absent=absent, cache=FP8)
    compiled.check()
    assert compiled.count("HGMMA") > 0 and compiled.count("HMMA") == 0
    assert compiled.count("LDS.U8") == compiled.count("LDG.E.U8") == 0
    assert compiled.count("LDGSTS.E.BYPASS.LTC128B.128") + compiled.count("LDGSTS.E.BYPASS.128") >= 16


@pytest.mark.parametrize(
    "variant",
    [
        {"cache": FP8, "dtype": "fp32"},
        {"cache": FP8, "dtype": "fp16"},
        {"cache": FP8, "head_dim": 64},
        {"cache": FP8, "head_dim": 256},
        {"cache": FP8, "head_dim": 96},
        {"cache": FP8, "WINDOW": 4096},
        {"cache": FP8, "GROUP": 7},
        {"dtype": "fp16"},
        {"dtype": "fp32"},
        {"head_dim": 256},
        {"head_dim": 96},
        {"GROUP": 7},
        {"PAGE": 16},
    ],
    ids=str,
)
def test_prompts_fit_for_other_models(variant: dict[str, int | str]) -> None:
    compile_prompt(**variant).check()  # type: ignore[arg-type]


def test_the_combination_of_tiles_fits() -> None:
    signature = dict.fromkeys(("partial", "scales"), "*fp32:16") | {"out": "*bf16:16"}
    signature |= dict.fromkeys(("lengths", "starts", "tiles"), "*i32") | dict.fromkeys(
        ("decode", "splits", "least"), "i32"
    )
    config = prompt_config(torch.bfloat16, 128)
    shape = {"GROUP": 4, "DIM": 128, "TILE": 32, "ROWS": config.rows, "STEP": config.step, "WINDOW": 0, "SLICE": SLICE}
    compile_sm90(combine_tile, signature, shape, config.warps).check()
