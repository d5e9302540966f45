"""Projections of few rows on the GPU: as exact as cuBLAS, the same every time, and safe beside other launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from pd.kernels import linear_triton
from pd.kernels.linear import linear
from pd.kernels.linear_configs import TABLE, Config, Row, Stream

DEVICE = torch.device("cuda")

#: Rows of x that each is for.
CONFIGS: list[tuple[Config, tuple[int, ...]]] = [
    (Stream(64, 256, 4, 4), (1, 7, 16)),
    (Stream(64, 128, 4, 4, per_sm=2), (1, 13, 32)),
    (Stream(64, 256, 3, 4, tma=True), (5, 16)),
    (Stream(128, 128, 3, 8, tma=True), (33, 64)),
    (Stream(128, 64, 4, 8), (100, 128)),
    (Stream(64, 128, 3, 4, per_sm=0, split=4), (8, 24)),
    (Stream(64, 128, 3, 4, per_sm=0), (8,)),
    (Row(4, 1024, 4), (1,)),
    (Row(8, 512, 8), (1,)),
]
CASES = [(config, rows) for config, many in CONFIGS for rows in many]
#: N, K: of Llama-3.1-8B, of Qwen2.5-0.5B, and sizes that no tile divides.
SHAPES = [(6144, 4096), (4096, 14336), (1152, 896), (9728, 896), (1000, 1040), (72, 48)]


def operands(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, k, dtype=dtype, device=DEVICE)
    weight = torch.randn(n, k, dtype=dtype, device=DEVICE) * k**-0.5
    return x, weight, torch.randn(n, dtype=dtype, device=DEVICE)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    result = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = result.chunk(2, -1)
        result = torch.nn.functional.silu(gate) * up
    return result


def torch_own(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    result = torch.nn.functional.linear(x, weight, bias)
    if gated:
        gate, up = result.chunk(2, -1)
        result = torch.nn.functional.silu(gate) * up
    return result


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def unwritten(rows: int, n: int, dtype: torch.dtype) -> None:
    """The memory that the next result of this size gets is full of NaN."""
    torch.full((rows, n), float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_rounding(shape: tuple[int, int], dtype: torch.dtype, gated: bool) -> None:
    n, k = shape
    for config, rows in CASES:
        if isinstance(config, Row) and k > 4096:
            continue
        if isinstance(config, Stream) and gated and linear_fits_not(config, rows):
            continue
        x, weight, bias = operands(rows, n, k, dtype)
        for given in (None, bias):
            expected = exact(x, weight, given, gated)
            unwritten(rows, expected.shape[1], dtype)
            found = linear_triton.launch(x, weight, given, config, gated)
            allowed = 2 * error(torch_own(x, weight, given, gated), expected)
            assert error(found, expected) <= allowed, (config, rows)


def linear_fits_not(config: Stream, rows: int) -> bool:
    """Gate and up are twice the tiles and the sums."""
    sums = 2 * config.block_n * max(rows, 16) / (32 * config.warps)
    tiles = config.stages * config.block_k * 2 * (2 * config.block_n + max(16, rows))
    return sums > 128 or tiles > 200 << 10


@pytest.mark.parametrize("config", [config for config, _ in CONFIGS], ids=str)
def test_every_run_gives_the_same_bits_with_other_work_beside_it(config: Config) -> None:
    x, weight, bias = operands(1 if isinstance(config, Row) else 16, 6144, 4096, torch.bfloat16)
    first = linear_triton.launch(x, weight, bias, config)
    beside = torch.cuda.Stream()
    busy = torch.randn(2048, 2048, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(beside):
            busy @ busy
            beside_result = linear_triton.launch(x, weight, bias, config)
        here = linear_triton.launch(x, weight, bias, config)
        torch.cuda.synchronize()
        assert torch.equal(here, first) and torch.equal(beside_result, first)


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_a_captured_chain_whose_kernels_overlap_gives_the_bits_of_one_at_a_time(early: bool) -> None:
    """Every kernel's input is what the kernel ahead of it writes."""
    configs: list[Config] = [
        Stream(64, 256, 3, 4, pdl=True, prefetch=2, early=early),
        Stream(64, 128, 3, 4, per_sm=2, tma=True, pdl=True, prefetch=4, early=early),
        Row(4, 1024, 4, pdl=True, early=early),
    ]
    weights = [operands(1, 4096, 4096, torch.bfloat16)[1] for _ in range(12)]
    x = operands(1, 1, 4096, torch.bfloat16)[0]

    def chain(pdl: bool) -> torch.Tensor:
        hidden = x
        for index, weight in enumerate(weights):
            config = configs[index % len(configs)]
            hidden = linear_triton.launch(hidden, weight, None, config if pdl else replace(config, pdl=False))
        return hidden

    expected = chain(pdl=False)
    chain(pdl=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(pdl=True)
    for _ in range(20):
        found.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, expected)


def test_the_op_agrees_with_torch_at_every_entry_of_the_table_and_where_there_is_none() -> None:
    entries = [(shape, rows) for shape, entry in TABLE.items() for rows in (1, *(most for most, _ in entry))]
    for (n, k), rows in [*entries, ((640, 320), 3)]:
        x, weight, bias = operands(rows, n, k, torch.bfloat16)
        for given in (None, bias):
            expected = exact(x, weight, given, False)
            allowed = 2 * error(torch_own(x, weight, given, False), expected)
            assert error(linear(x, weight, given), expected) <= allowed, (n, k, rows)


def test_rows_that_lie_apart_or_off_the_grid_of_16_bytes_are_right_too() -> None:
    wide = torch.randn(8, 4200, dtype=torch.bfloat16, device=DEVICE)
    weight = operands(1, 512, 4096, torch.bfloat16)[1]
    for start in (0, 8, 1):
        x = wide[:, start : start + 4096]
        found = linear(x, weight)
        assert error(found, exact(x, weight, None, False)) < 4e-3
    found = linear_triton.launch(wide[:, 8:4104], weight, None, Stream(64, 256, 4, 4))
    assert error(found, exact(wide[:, 8:4104], weight, None, False)) < 4e-3
