"""Projections by the interpreted kernels, against torch: sizes that tiles do not divide, work shared in every way."""

from __future__ import annotations

import pytest
import torch

from pd.kernels import linear_triton
from pd.kernels.linear_configs import Config, Row, Stream

#: Error allowed, by the largest value: the sums are of float32 whatever the operands.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}

STREAMS = {
    "whole blocks": Stream(32, 32, 3, 4, per_sm=0),
    "three programs cut through blocks": Stream(32, 32, 3, 4),
    "blocks shared by several programs": Stream(64, 16, 3, 4, per_sm=2),
    "every block split": Stream(32, 32, 3, 4, per_sm=0, split=2),
    "a program per step": Stream(32, 32, 3, 4, per_sm=100),
    "the copy engine": Stream(32, 32, 3, 4, tma=True),
}
#: rows, N, K
SHAPES = {"even": (16, 128, 96), "odd": (5, 70, 80), "one row": (1, 33, 48), "rows to pad": (19, 96, 144)}


def operands(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * n + k)
    return torch.randn(rows, k, dtype=dtype), torch.randn(n, k, dtype=dtype) / k**0.5, torch.randn(n, dtype=dtype)


def check(config: Config, rows: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = operands(rows, n, k, dtype)
    found = linear_triton.launch(x, weight, bias if biased else None, config)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float() if biased else None)
    assert found.dtype == dtype
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype]
    assert not any(counters.any() for counters in [linear_triton._arrivals_here(x.device)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", STREAMS)
def test_rows_stream_through_the_weight(config: str, shape: str) -> None:
    check(STREAMS[config], *SHAPES[shape], torch.float32, biased=shape == "odd")


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_half_precision_is_summed_in_single(biased: bool) -> None:
    check(STREAMS["three programs cut through blocks"], *SHAPES["odd"], torch.float16, biased)


@pytest.mark.parametrize("config", [Stream(128, 32, 3, 4), Stream(256, 32, 3, 4, per_sm=0)], ids=["cut", "whole"])
def test_many_sums_are_stored_in_parts(config: Config) -> None:
    check(config, 50, 300, 160, torch.float32, biased=config.block_n == 256)


@pytest.mark.parametrize("shape", [(1, 64, 256), (1, 33, 80), (1, 6, 304)], ids=str)
def test_a_single_row(shape: tuple[int, int, int]) -> None:
    check(Row(8, 128, 4), *shape, torch.float32, biased=shape[1] == 33)
    check(Row(4, 64, 4), *shape, torch.float16, biased=shape[1] != 33)


def test_rows_may_lie_apart() -> None:
    x, weight, _ = operands(6, 40, 64, torch.float32)
    wide = torch.full((6, 100), float("nan"))
    wide[:, 4:68] = x
    found = linear_triton.launch(wide[:, 4:68], weight, None, Stream(32, 32, 3, 4))
    assert torch.allclose(found, x @ weight.T, atol=1e-5)


def test_the_work_is_shared_evenly() -> None:
    assert linear_triton.shares(Stream(64, 128, 3, 4), 6144, 4096, 132) == (132, True)
    assert linear_triton.shares(Stream(64, 128, 3, 4, per_sm=0), 6144, 4096, 132) == (96, False)
    assert linear_triton.shares(Stream(64, 128, 3, 4, per_sm=0, split=2), 6144, 4096, 132) == (192, True)
    assert linear_triton.shares(Stream(64, 128, 3, 4, per_sm=4), 64, 512, 132) == (4, True)
