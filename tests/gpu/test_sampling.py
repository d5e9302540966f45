"""Sampling on the GPU against the reference in torch, token for token; and in a captured graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pd.kernels.philox import DrawKeys, gumbel
from pd.kernels.sampling import DrawParams, draw
from pd.kernels.sampling_device import COLDEST, DeviceSampling, sample_rows
from tests.sampling_kit import device_sampling

DEVICE = "cuda:0"
VOCAB = 128_256


def random_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(rows, vocab, generator=generator, device=DEVICE)).to(dtype)


def check(logits: torch.Tensor, sampling: DeviceSampling, restricted: bool = False, ties: int = 1) -> torch.Tensor:
    """Tokens and logprobs are the reference's, up to `ties` rows whose two tokens have nearly the same score."""
    tokens, logprobs = sample_rows(logits, sampling, restricted=restricted, logprobs=True)
    expected = exact(logits, sampling, restricted)
    assert logprobs is not None
    assert tokens.dtype == torch.int32
    differ = (tokens != expected).nonzero()[:, 0]
    assert len(differ) <= ties
    for row in differ.tolist():
        assert float(sampling.temperature[row]) >= COLDEST, "greedy rows have no rounding"
        noise = gumbel(DrawKeys(*((int(one[row]),) for one in keys(sampling))), logits.shape[1], logits.device)[0]
        scores = logits[row].double() / sampling.temperature[row] + noise
        first, second = float(scores[tokens[row]]), float(scores[expected[row]])
        assert abs(first - second) <= 1e-6 * max(1.0, abs(first))
    reference = logits.float().log_softmax(-1).gather(1, tokens[:, None].long())[:, 0]
    assert torch.allclose(logprobs, reference, atol=5e-5, rtol=1e-5)
    return tokens


def exact(logits: torch.Tensor, sampling: DeviceSampling, restricted: bool) -> torch.Tensor:
    """The reference in float64: in float32 its sum over a row's tokens is off by the weight of several of them."""
    greedy = sampling.temperature < COLDEST
    rows = torch.arange(len(logits) if restricted else 0, device=logits.device)
    params = DrawParams(
        sampling.temperature.masked_fill(greedy, 1.0), sampling.top_k.long(), sampling.top_p, sampling.min_p, rows
    )
    drawn = draw(logits.double(), params, DrawKeys(*(tuple(one.tolist()) for one in keys(sampling))))
    return torch.where(greedy, logits.argmax(-1), drawn)


def keys(sampling: DeviceSampling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return sampling.seed, sampling.choice, sampling.position


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_greedy_and_warm_rows_are_the_references(rows: int, dtype: torch.dtype) -> None:
    for seed, scale in ((1, 0.01), (2, 1.0), (3, 8.0)):
        logits = random_logits(rows, VOCAB, dtype, seed, scale)
        check(logits, device_sampling(rows, temperature=[0.0, 1.0, 0.7, 2.0], seed=seed, position=500, device=DEVICE))
        check(logits, device_sampling(rows, temperature=[1.0, 0.3], seed=-seed, position=9, device=DEVICE))


@pytest.mark.parametrize("vocab", [1, 1000, 1023, 4097, 32_003, 151_936])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_vocabulary_is_sampled(vocab: int, dtype: torch.dtype) -> None:
    for rows in (3, 40):
        sampling = device_sampling(rows, temperature=[1.0, 0.0, 1.5], position=3, device=DEVICE)
        check(random_logits(rows, vocab, dtype, vocab), sampling)


def test_ten_thousand_draws_are_the_references() -> None:
    logits = random_logits(1, 1000, torch.float32).expand(10_000, -1)
    check(logits, device_sampling(10_000, temperature=[1.0, 0.3, 2.0], device=DEVICE))


LIMITS = {
    "top_k": {"top_k": [1, 50, 1000, 100_000, 200_000]},
    "top_p": {"top_p": [1e-6, 0.1, 0.9, 0.95, 0.999]},
    "min_p": {"min_p": [1e-6, 0.01, 0.2, 0.9, 1.0]},
    "all": {"top_k": [40, 5000, 0, 5, 900], "top_p": [0.9, 0.5, 0.7, 1.0, 0.99], "min_p": [0.0, 0.001, 0.1, 0.3, 0.0]},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_restricted_rows_are_the_references(limits: dict[str, Any], rows: int, dtype: torch.dtype) -> None:
    for seed, scale in ((1, 0.01), (2, 1.0), (3, 8.0)):
        logits = random_logits(rows, VOCAB, dtype, seed, scale)
        temperature = [1.0, 0.7, 2.0, 1.0, 0.2, 0.0]
        sampling = device_sampling(rows, temperature=temperature, seed=seed, position=50, device=DEVICE, **limits)
        check(logits, sampling, restricted=True)


@pytest.mark.parametrize("vocab", [1, 1000, 4097, 32_003, 151_936])
def test_any_vocabulary_is_restricted(vocab: int) -> None:
    for dtype in (torch.float16, torch.float32):
        sampling = device_sampling(40, temperature=[1.0, 0.0, 1.5], top_k=[0, 20], top_p=[0.9, 1.0, 0.8], device=DEVICE)
        check(random_logits(40, vocab, dtype, vocab), sampling, restricted=True)


def test_draws_follow_the_distribution() -> None:
    count = 60_000
    logits = torch.tensor([1.2, -0.3, 0.0, 2.0, -1.0, 0.7, 1.9], device=DEVICE)
    sampling = device_sampling(count, temperature=0.8, seed=3, device=DEVICE)
    tokens, _ = sample_rows(logits.expand(count, -1), sampling, restricted=False, logprobs=False)
    expected = (logits / 0.8).softmax(-1).double() * count
    observed = tokens.long().bincount(minlength=7)
    assert float(((observed - expected).square() / expected).sum()) < 22.46  # 6 degrees of freedom, 0.1 %


def test_masked_rows_and_what_is_no_number_give_tokens_of_the_vocabulary() -> None:
    logits = torch.full((20, VOCAB), float("-inf"), device=DEVICE)
    logits[:8, 100_000] = -5.0
    logits[8:12] = float("nan")
    logits[12:16] = float("inf")
    sampling = device_sampling(20, temperature=[0.0, 1.0], device=DEVICE)
    tokens, _ = sample_rows(logits, sampling, restricted=False, logprobs=True)
    assert tokens[:8].tolist() == [100_000] * 8
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


@pytest.mark.parametrize("restricted", [False, True])
def test_a_captured_graph_samples_what_its_inputs_hold_then(restricted: bool) -> None:
    logits = random_logits(8, VOCAB, torch.bfloat16)
    sampling = device_sampling(8, temperature=[0.0, 1.0], top_p=0.9, device=DEVICE)
    sample_rows(logits, sampling, restricted=restricted, logprobs=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = sample_rows(logits, sampling, restricted=restricted, logprobs=True)
    for seed in range(1, 4):
        logits.copy_(random_logits(8, VOCAB, torch.bfloat16, seed))
        other = device_sampling(8, temperature=[1.0, 0.0], top_k=seed * 20, seed=seed, position=seed, device=DEVICE)
        for field in dataclasses.fields(sampling):
            getattr(sampling, field.name).copy_(getattr(other, field.name))
        graph.replay()
        expected, _ = sample_rows(logits, other, restricted=restricted, logprobs=False)
        assert torch.equal(tokens, expected)
