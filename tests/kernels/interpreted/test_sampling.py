"""Sampling by the interpreted kernels, against the reference in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from sampling_kit import device_sampling

from pd.kernels import cuts_triton, sampling_device, sampling_triton
from pd.kernels.philox import DrawKeys, gumbel, philox
from pd.kernels.sampling import restrict
from pd.kernels.sampling_device import DeviceSampling


def random_logits(rows: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)


def both(
    logits: torch.Tensor, sampling: DeviceSampling, restricted: bool = False, raw: torch.Tensor | None = None
) -> tuple[list[int], list[int]]:
    """Tokens of the kernels and of the reference; their logprobs are compared here."""
    tokens, logprobs = sampling_triton.sample_rows(logits, sampling, restricted, raw, logprobs=True)
    expected, reference = sampling_device.sample_rows(logits, sampling, restricted=restricted, logprobs=True, raw=raw)
    assert logprobs is not None and reference is not None
    assert tokens.dtype == torch.int32
    same = tokens == expected
    assert torch.allclose(logprobs[same], reference[same], atol=2e-5, rtol=1e-5, equal_nan=True)
    return tokens.tolist(), expected.tolist()


@triton.jit
def random_words(seeds, choices, positions, tokens, words, noise, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    ids = tl.load(tokens + lanes)
    found = sampling_triton._words_of(tl.load(seeds), tl.load(choices), tl.load(positions), ids)
    tl.store(words + lanes, found.to(tl.int64))
    tl.store(noise + lanes, sampling_triton._gumbel(found))


@pytest.mark.parametrize("seed", [0, 9, -1, 2**63 - 1, 12345678901234567])
def test_random_words_are_those_of_the_reference_bit_for_bit(seed: int) -> None:
    tokens = torch.cat((torch.arange(200), torch.tensor([128_255, 151_935, 2**22]))).int()[:128]
    words, noise = torch.zeros(128, dtype=torch.int64), torch.zeros(128)
    columns = [
        torch.tensor([value], dtype=dtype)
        for value, dtype in ((seed, torch.int64), (3, torch.int32), (77, torch.int32))
    ]
    random_words[(1,)](*columns, tokens, words, noise, LANES=128)
    key = torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([(seed >> 32) & 0xFFFFFFFF])
    counter = tokens.long() // 4, torch.tensor([77]), torch.tensor([3]), torch.tensor([0])
    expected = torch.stack(philox(counter, key)).gather(0, tokens[None].long() % 4)[0]
    assert torch.equal(words, expected)
    reference = gumbel(DrawKeys((seed,), (3,), (77,)), int(tokens.max()) + 1, torch.device("cpu"))[0, tokens.long()]
    assert torch.allclose(noise, reference, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("vocab", [1, 3, 7, 1000, 1024, 1027, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_greedy_and_warm_rows_of_one_batch(vocab: int, dtype: torch.dtype) -> None:
    sampling = device_sampling(5, temperature=[0.0, 1.0, 0.5, 3.0, 1e-6], seed=7, position=100)
    tokens, expected = both(random_logits(5, vocab, vocab, dtype), sampling)
    assert tokens == expected


def test_draws_of_one_distribution_are_those_of_the_reference() -> None:
    """Few here, where a draw takes some 50 ms; ten thousand on the GPU."""
    tokens, expected = both(random_logits(1, 1000).expand(60, -1), device_sampling(60, temperature=[1.0, 0.3, 2.0]))
    assert tokens == expected
    assert len(set(tokens)) > 15


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rows", [2, 17])
def test_among_equal_logits_the_smallest_id_is_greedy(rows: int) -> None:
    logits = torch.zeros(rows, 9000)
    logits[0, [4097, 1023, 8999]] = 2.0
    logits[1, [8192, 4096, 4095]] = float("inf")
    logits[-1, :5000] = float("-inf")
    tokens, expected = both(logits, device_sampling(rows, temperature=0.0))
    assert tokens[:1] == expected[:1] == [1023]
    assert tokens == expected


def test_flat_and_peaked_rows_are_drawn_as_the_reference_draws_them() -> None:
    logits = torch.zeros(4, 3000)
    logits[1, 2500] = 12.0
    logits[2] = float("-inf")
    logits[2, [5, 2047, 2998]] = torch.tensor([0.5, 0.0, 1.0])
    logits[3] *= 1e4
    logits[3, ::7] += 1e4
    for position in range(0, 24, 4):
        tokens, expected = both(logits, device_sampling(4, temperature=[1.0, 1.0, 1.0, 0.01], position=position))
        assert tokens == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tokens_are_inside_the_vocabulary_whatever_the_logits() -> None:
    logits = torch.full((18, 1500), float("nan"))
    logits[2:4], logits[4:6] = float("-inf"), float("inf")
    sampling = device_sampling(18, temperature=[0.0, 1.0], top_k=[0, 7], top_p=[1.0, 0.8], min_p=[0.0, 0.1])
    for restricted in (False, True):
        tokens, _ = sampling_triton.sample_rows(logits, sampling, restricted, None, logprobs=True)
        assert ((tokens >= 0) & (tokens < 1500)).all()
        assert tokens[2:6].tolist() == [0] * 4


def test_logprobs_are_of_the_raw_logits_where_these_are_given() -> None:
    raw = random_logits(3, 2500, 5, torch.float16)
    logits = raw.float()
    logits[:, ::2] = float("-inf")
    tokens, expected = both(logits, device_sampling(3, temperature=[0.0, 1.0, 1.0]), raw=raw)
    assert tokens == expected
    assert all(token % 2 for token in tokens)


def test_rows_may_lie_apart() -> None:
    wide = random_logits(4, 2000, 6)
    tokens, expected = both(wide[:, :1501], device_sampling(4))
    assert tokens == expected


LIMITS = {
    "top_k": {"top_k": [1, 3, 50, 999, 5000]},
    "top_p": {"top_p": [1e-6, 0.1, 0.5, 0.9, 0.99]},
    "min_p": {"min_p": [1e-6, 0.01, 0.2, 0.9, 1.0]},
    "all": {"top_k": [40, 700, 0, 5, 900], "top_p": [0.9, 0.5, 0.7, 1.0, 0.99], "min_p": [0.0, 0.001, 0.1, 0.3, 0.0]},
}
TEMPERATURES = [1.0, 0.5, 2.0, 1.0, 1.3]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab", "steps"), [(1000, 4), (9001, 1), (9001, None)], ids=["ties", "many", "few"])
def test_cuts_leave_what_the_reference_leaves(
    limits: dict[str, Any], dtype: torch.dtype, vocab: int, steps: int | None
) -> None:
    logits = random_logits(5, vocab, 3, dtype)
    if steps is not None:
        logits = (logits * steps).round() / steps
    sampling = device_sampling(5, temperature=TEMPERATURES, **limits)
    cuts, last = cuts_triton.find_cuts(logits, sampling)
    wide = logits.float()
    kept = (wide > cuts[:, None]) | ((wide == cuts[:, None]) & (torch.arange(vocab) <= last[:, None]))
    scaled = wide.double() / sampling.temperature[:, None]  # float32 sums of all the rows' tokens err by more than one
    expected = restrict(scaled, sampling.top_k.long(), sampling.top_p, sampling.min_p) > float("-inf")
    assert (kept != expected).sum(1).tolist() == [0] * 5


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_restricted_rows_draw_as_the_reference_does(limits: dict[str, Any]) -> None:
    logits = random_logits(10, 1000, 4)
    logits[3, 7:] = float("-inf")
    sampling = device_sampling(10, temperature=[*TEMPERATURES, 0.0, 1.0], **limits)
    tokens, expected = both(logits, sampling, restricted=True)
    assert tokens == expected


def test_one_logit_for_all_and_a_cut_among_zeros_of_both_signs() -> None:
    logits = torch.full((4, 5000), 2.5)
    logits[2] = torch.tensor([0.0, -0.0]).repeat(2500)
    logits[3] = torch.tensor([-0.0, 0.0]).repeat(2500)
    logits[2:, 100] = 1.0
    cuts, last = cuts_triton.find_cuts(logits, device_sampling(4, top_k=[7, 0, 11, 11], top_p=[1.0, 0.5, 1.0, 1.0]))
    assert cuts.tolist() == [2.5, 2.5, 0.0, 0.0]
    assert last.tolist() == [6, 2499, 9, 9]


def test_rows_without_limits_have_no_cut() -> None:
    logits = random_logits(3, 500)
    sampling = device_sampling(3, temperature=[1.0, 1.0, 0.0], top_k=[0, 500, 5], top_p=[1.0, 1.0, 0.5])
    cuts, last = cuts_triton.find_cuts(logits, sampling)
    assert cuts.tolist() == [float("-inf")] * 3
    assert last.tolist() == [2**31 - 1] * 3
