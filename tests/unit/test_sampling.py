"""Random numbers, distributions, restrictions and penalties. Seeds are fixed, so nothing here is flaky."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pd.kernels.philox import DrawKeys, gumbel, philox
from pd.kernels.sampling import DrawParams, add_bias, draw, forbid, greedy, penalise, restrict
from pd.runner.inputs import Growing, Request
from pd.runner.sampler import sample
from pd.types import SamplingParams

CPU = torch.device("cpu")
LOGITS = torch.tensor([1.2, -0.3, 0.0, 2.0, -1.0, 0.7, 1.9])


def keys(count: int, *, seed: int = 1, choice: int = 0, position: int = 0) -> DrawKeys:
    """`count` draws at consecutive positions."""
    return DrawKeys((seed,) * count, (choice,) * count, tuple(range(position, position + count)))


def params(
    count: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> DrawParams:
    restricted = top_k > 0 or top_p < 1.0 or min_p > 0.0
    return DrawParams(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        restricted=torch.arange(count if restricted else 0),
    )


def frequencies(count: int, **settings: Any) -> torch.Tensor:
    tokens = draw(LOGITS.expand(count, -1), params(count, **settings), keys(count))
    return tokens.bincount(minlength=len(LOGITS)) / count


def chi_square(observed: torch.Tensor, expected: torch.Tensor, count: int) -> float:
    """Pearson's statistic over the categories that can occur."""
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    return float((count * (observed - expected)[possible].square() / expected[possible]).sum())


def only(ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The distribution restricted to `ids`."""
    masked = torch.full_like(LOGITS, float("-inf"))
    masked[ids] = LOGITS[ids] / temperature
    return masked.softmax(-1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Random123's known-answer tests for philox4x32-10."""
    words = philox(
        tuple(torch.tensor([word]) for word in counter),  # type: ignore[arg-type]
        tuple(torch.tensor([word]) for word in key),  # type: ignore[arg-type]
    )
    assert tuple(int(word) for word in words) == expected


def test_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(keys(200), 1001, CPU).flatten().double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    ordered = noise.sort().values
    exact = torch.exp(-torch.exp(-ordered))
    empirical = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert float((exact - empirical).abs().max()) < 1.63 / math.sqrt(len(ordered))  # Kolmogorov-Smirnov, 1 %


def test_noise_depends_on_seed_choice_position_and_token_only() -> None:
    one = gumbel(DrawKeys((9,), (2,), (77,)), 50, CPU)[0]
    batch = gumbel(DrawKeys((1, 9, 2**63 + 5), (0, 2, 1), (3, 77, 77)), 203, CPU)
    assert torch.equal(batch[1, :50], one)
    rows = [
        gumbel(DrawKeys((seed,), (choice,), (position,)), 50, CPU)[0]
        for seed, choice, position in [(9, 2, 77), (10, 2, 77), (9 + 2**40, 2, 77), (9, 3, 77), (9, 2, 78)]
    ]
    for other in rows[1:]:
        assert not (other == rows[0]).any()
    assert torch.equal(gumbel(DrawKeys((-1,), (0,), (0,)), 8, CPU), gumbel(DrawKeys((2**64 - 1,), (0,), (0,)), 8, CPU))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LOGITS.softmax(-1)),
        ({"temperature": 0.5}, (LOGITS / 0.5).softmax(-1)),
        ({"temperature": 3.0}, (LOGITS / 3.0).softmax(-1)),
        ({"top_k": 3}, only([0, 3, 6])),
        ({"top_k": 100}, LOGITS.softmax(-1)),
        ({"top_p": 0.6}, only([3, 6])),
        ({"top_p": 1e-9}, only([3])),
        ({"min_p": 0.4}, only([0, 3, 6])),
        ({"top_k": 3, "top_p": 0.8}, only([3, 6])),
        ({"temperature": 0.25, "min_p": 0.4}, only([3, 6], 0.25)),
    ],
)
def test_draws_follow_the_distribution(settings: dict[str, Any], expected: torch.Tensor) -> None:
    count = 20_000
    statistic = chi_square(frequencies(count, **settings), expected, count)
    assert statistic < 22.46  # chi-square, 6 degrees of freedom, 0.1 %


def test_draws_at_consecutive_positions_are_independent() -> None:
    count = 20_000
    tokens = draw(LOGITS.expand(count, -1), params(count), keys(count))
    pairs = (tokens[:-1] * 7 + tokens[1:]).bincount(minlength=49).double() / (count - 1)
    single = LOGITS.softmax(-1).double()
    assert chi_square(pairs, (single[:, None] * single[None]).flatten(), count - 1) < 84.0  # 48 degrees, 0.1 %


def test_top_k_keeps_exactly_k_among_equal_logits() -> None:
    kept = restrict(torch.zeros(1, 9), torch.tensor([4]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert kept.isfinite()[0].tolist() == [True] * 4 + [False] * 5
    assert greedy(torch.tensor([[0.0, 3.0, 3.0]])).tolist() == [1]


def test_restrictions_of_one_row_leave_the_others_alone() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    mixed = DrawParams(
        temperature=torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.0]),
        top_k=torch.tensor([0, 5, 0, 0, 1, 0]),
        top_p=torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0]),
        restricted=torch.tensor([1, 2, 3, 4]),
    )
    together = draw(logits, mixed, keys(6))
    for row in range(6):
        alone = DrawParams(
            mixed.temperature[row : row + 1],
            mixed.top_k[row : row + 1],
            mixed.top_p[row : row + 1],
            mixed.min_p[row : row + 1],
            torch.arange(1 if 1 <= row <= 4 else 0),
        )
        assert draw(logits[row : row + 1], alone, keys(1, position=row)).tolist() == [int(together[row])]
    assert together[4] == logits[4].argmax()


def test_penalties_act_on_what_their_definitions_say() -> None:
    row = torch.tensor([2.0, -2.0, 1.0, 0.5, 4.0])
    known, emitted = torch.tensor([0, 1, 2, 2, 2, 4]), torch.tensor([2, 2, 4])
    penalise(row, known, emitted, repetition=2.0, frequency=0.25, presence=1.0)
    assert row.tolist() == [1.0, -4.0, 0.5 - 0.5 - 1.0, 0.5, 2.0 - 0.25 - 1.0]


def test_bias_and_masks_ignore_ids_outside_the_vocabulary() -> None:
    row = torch.zeros(4)
    add_bias(row, {1: 2.5, 9: 100.0, -1: 100.0})
    forbid(row, (3, 4, -2))
    assert row.tolist() == [0.0, 2.5, 0.0, float("-inf")]


def request(sampling: SamplingParams, tokens: list[int], prompt_len: int, choices: int = 1) -> Request:
    return Request(
        key=1,
        epoch=1,
        prompt_len=prompt_len,
        computed=len(tokens),
        tokens=Growing(np.array(tokens, dtype=np.int32)),
        blocks=Growing(np.zeros(0, dtype=np.int32)),
        sampling=sampling,
        choices=choices,
        logprob_start=-1,
        prompt_top_logprobs=0,
    )


def test_min_tokens_forbids_stop_ids_until_enough_tokens_follow_the_prompt() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0, 1.0]])
    sampling = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1, 2))
    short = request(sampling, [0, 0, 0, 3], prompt_len=3)
    enough = request(sampling, [0, 0, 0, 3, 3], prompt_len=3)
    assert sample([short], logits.clone())[0].tokens == [3]
    assert sample([enough], logits.clone())[0].tokens == [1]


def test_penalties_count_output_from_the_prompts_end() -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0, 0.0]])
    sampling = SamplingParams(temperature=0.0, presence_penalty=1.0)
    assert sample([request(sampling, [0, 0, 0], prompt_len=3)], logits.clone())[0].tokens == [0]
    assert sample([request(sampling, [0, 0, 0], prompt_len=2)], logits.clone())[0].tokens == [1]


def test_sampling_alters_no_request() -> None:
    logits = torch.randn(3, 20)
    requests = [
        request(SamplingParams(temperature=0.7, repetition_penalty=1.3, logit_bias={3: 5.0}), [1, 2, 3], 2, choices=3),
        request(SamplingParams(temperature=0.0, frequency_penalty=1.0, min_tokens=9, stop_token_ids=(4,)), [1, 2], 1),
        request(SamplingParams(temperature=1.0, top_p=0.5, logprobs=True), [5], 1),
    ]
    results = sample(requests, logits)
    assert [len(result.tokens) for result in results] == [3, 1, 1]
    assert [result.logprobs is not None for result in results] == [False, False, True]
    assert [len(one.tokens) for one in requests] == [3, 2, 1]


def test_a_requests_tokens_do_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(2))
    kinds = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=2, top_p=0.9),
        SamplingParams(temperature=1.2, seed=3, top_k=10, min_p=0.05),
        SamplingParams(temperature=1.0, seed=4, presence_penalty=0.5, logprobs=True, top_logprobs=2),
        SamplingParams(temperature=1e-7, seed=4),
        SamplingParams(temperature=1.0, seed=1, choice=1),
        SamplingParams(temperature=1.5, seed=2**63),
    ]
    requests = [request(kind, list(range(5 + index)), 3, choices=1 + index % 3) for index, kind in enumerate(kinds)]
    together = sample(requests, logits.clone())
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = sample([requests[index] for index in order], logits[order].clone())
    for index, one in enumerate(requests):
        assert sample([one], logits[index : index + 1].clone())[0] == together[index]
        assert shuffled[order.index(index)] == together[index]
    assert together[5].tokens == [int(logits[5].argmax())] * 3


def test_choices_of_one_request_use_different_numbers() -> None:
    sampling = SamplingParams(temperature=1.0, seed=6)
    tokens = sample([request(sampling, [1, 2], 2, choices=64)], torch.zeros(1, 1000))[0].tokens
    assert len(set(tokens)) > 55
