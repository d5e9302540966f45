"""Projections of few rows on the GPU: exact but for rounding, the same every time, and safe beside other launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from pd.kernels import linear_triton
from pd.kernels.linear import linear
from pd.kernels.linear_configs import TABLE, Config, Row, Stream, config_for

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
#: N, K: of Llama-3.1-8B, of Qwen2.5-0.5B, and sizes that no tile divides.
SHAPES = [(6144, 4096), (4096, 14336), (1152, 896), (9728, 896), (1000, 1040), (72, 48)]


def operands(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows + n + k)
    x = torch.randn(rows, k, dtype=dtype, device=DEVICE)
    weight = torch.randn(n, k, dtype=dtype, device=DEVICE) * k**-0.5
    return x, weight, torch.randn(n, dtype=dtype, device=DEVICE)


def problem(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    """What is wrong with x weight^T + bias, which is exact but for the rounding of the result; "" if nothing is.

    Half an eps is the most that rounding moves a result, relatively; sums of float32 add at most 1e-3 to results whose
    standard deviation is 1 to 1.4.
    """
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    try:
        rounding = torch.finfo(found.dtype).eps / 2
        torch.testing.assert_close(found.double(), exact, rtol=1.01 * rounding, atol=1e-3)
    except AssertionError as error:
        library = torch.nn.functional.linear(x, weight, bias).double()
        return f"{error}\ncuBLAS is off by {float((library - exact).abs().max())}"
    return ""


def problem_of_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    found = linear(x, weight, bias)
    if config_for(x.shape[0], *weight.shape) is not None:
        return problem(found, x, weight, bias)
    return "" if torch.equal(found, torch.nn.functional.linear(x, weight, bias)) else "these are not cuBLAS's bits"


def check(config: Config, rows: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> str:
    x, weight, bias = operands(rows, n, k, dtype)
    torch.full(
        (rows, n), float("nan"), dtype=dtype, device=DEVICE
    )  # the memory that the result gets: all unwritten shows
    given = bias if biased else None
    try:
        found = linear_triton.launch(x, weight, given, config)
        torch.cuda.synchronize()
        return problem(found, x, weight, given)
    except Exception as error:  # too much shared memory, say: the other cases are told all the same
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config,many", CONFIGS, ids=str)
def test_nothing_but_the_result_is_rounded(config: Config, many: tuple[int, ...], dtype: torch.dtype) -> None:
    problems = []
    for rows in many:
        for n, k in SHAPES if dtype == torch.bfloat16 else SHAPES[2:5]:
            biased = k < 4096
            wrong = check(config, rows, n, k, dtype, biased)
            problems += [f"{rows} rows, {n} x {k}, bias {biased}: {wrong}"] if wrong else []
    assert not problems, "\n".join(problems)


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


@pytest.mark.parametrize("n,k", TABLE, ids=str)
def test_the_op_is_right_at_every_entry_of_the_table_and_between_them(n: int, k: int) -> None:
    for rows in (1, 2, *(rows for most, _ in TABLE[n, k] for rows in (most - 3, most, most + 1))):
        x, weight, bias = operands(rows, n, k, torch.bfloat16)
        for given in (None, bias):
            wrong = problem_of_op(x, weight, given)
            assert not wrong, f"{rows} rows, bias {given is not None}: {wrong}"


@pytest.mark.parametrize("n,k", [(24576, 4096), (4096, 12288), (640, 320)], ids=str)
def test_the_op_is_right_for_shapes_that_are_not_in_the_table(n: int, k: int) -> None:
    for rows in (1, 3):
        x, weight, bias = operands(rows, n, k, torch.bfloat16)
        assert not problem_of_op(x, weight, bias)


def test_rows_that_lie_apart_or_off_the_grid_of_16_bytes_are_right_too() -> None:
    wide = torch.randn(8, 4200, dtype=torch.bfloat16, device=DEVICE)
    weight = operands(1, 4096, 4096, torch.bfloat16)[1]
    for start in (0, 8):
        for rows in (1, 8):
            x = wide[:rows, start : start + 4096]
            assert not problem(linear(x, weight), x, weight, None), f"{rows} rows from column {start}"
    x = wide[:, 1:4097]
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
