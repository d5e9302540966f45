"""Whole models on a GPU against transformers in float32 (eager attention, TF32 off), along traffic as a server has it.

In float32 every logprob is within TOLERANCE of transformers' and every greedy token is its. In bfloat16 no logprob is
off by more than twice the most by which transformers in bfloat16 is off, nor are all of them by more than twice as much
on average (root mean square).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pd.messages import StepOrder
from pd.runner.cuda_digest import PoolDigests
from pd.runner.graphs import Outcome, StepGraphs, graph_sizes
from pd.runner.inputs import Row
from pd.transfer.digest import DigestGeometry, digest_blocks
from pd.types import SamplingParams
from tests.oracle import Oracle, Scales, tiny_model
from tests.worker_driver import GREEDY, Driver, Track, i32

#: Logprobs by (request, position).
Said = dict[tuple[int, int], float]
Errors = npt.NDArray[np.float64]

pytestmark = pytest.mark.usefixtures("without_tf32")

DEVICE = "cuda:0"
PAGE, VOCAB = 16, 4096
TOLERANCE = 1e-4
FP8_TOLERANCE = 2e-2

#: Largest captured batch: the traffic has larger ones too.
LARGEST = 8

#: Widths of what people serve, few layers. Weights in bfloat16, so that both types compute the same model.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
    "spread": 0.0375,
}
HEADS_OF_64 = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", **HEADS_OF_64},
    "qwen2": {"arch": "qwen2", "num_attention_heads": 16, "num_key_value_heads": 4},
    "qwen3": {"arch": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    "mistral": {
        "arch": "mistral",
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "sliding_window": 200,
    },
}

PENALISED = SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=True)
NARROW = SamplingParams(temperature=0.9, seed=3, top_k=12, top_p=0.9, logprobs=True)
PLAIN = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=0.8, seed=7)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request for `count` tokens that comes before step `at`. Its first `shared` blocks are those of request 0."""

    at: int
    length: int
    count: int
    sampling: SamplingParams = GREEDY
    chunk: int = 1 << 30
    scored: bool = False
    shared: int = 0

    def prompt(self, key: int) -> list[int]:
        start = TRAFFIC[0].prompt(0)[: self.shared * PAGE] if self.shared else []
        return start + np.random.default_rng(key).integers(0, VOCAB, self.length - len(start)).tolist()


#: A prompt alone of a length that cuDNN takes as it is, and one that it takes padded; chunks; a cached prefix; batches
#: of one to twelve, with and without prompts; then such that a graph samples itself; and short prompts alone.
TRAFFIC = (
    Ask(0, 1024, 34, scored=True),
    Ask(2, 37, 30, chunk=16, scored=True),
    Ask(2, 1, 26),
    Ask(3, 300, 25, chunk=128, scored=True),
    Ask(4, 16, 22),
    Ask(5, 900, 24, scored=True),
    Ask(7, 700, 17, shared=40),
    Ask(8, 15, 18),
    Ask(8, 130, 15, chunk=33, scored=True),
    Ask(9, 250, 12),
    Ask(10, 3, 9),
    Ask(11, 64, 8, NARROW),
    Ask(14, 40, 3, PENALISED),
    Ask(50, 30, 20, PLAIN),
    Ask(50, 500, 20, WARM),
    Ask(51, 1, 14, PLAIN),
    Ask(52, 90, 14, WARM),
    Ask(53, 17, 8, PLAIN),
    Ask(80, 333, 5, PLAIN, scored=True),
    Ask(90, 600, 5),
)
GREEDY_KEYS = [key for key, ask in enumerate(TRAFFIC) if ask.sampling in (GREEDY, PLAIN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """("decode", rows) or ("prompts", rows) of each graph's step, after ("fresh", tokens) if it was one."""
    found: list[tuple[str, int]] = []
    decode, prompts, find = StepGraphs.decode, StepGraphs.prompts, StepGraphs._find

    def noted_find(self: StepGraphs, kind: str, sizes: Sequence[int], needed: int) -> Any:
        found.extend([(kind, needed)] if kind == "fresh" and needed <= sizes[-1] else [])
        return find(self, kind, sizes, needed)

    def noted_decode(self: StepGraphs, rows: Sequence[Row], grown: Mapping[int, int]) -> Outcome | None:
        outcome = decode(self, rows, grown)
        found.extend([("decode", len(rows))] if outcome is not None else [])
        return outcome

    def noted_prompts(self: StepGraphs, rows: Sequence[Row]) -> Outcome | None:
        outcome = prompts(self, rows)
        found.extend([("prompts", len(rows))] if outcome is not None else [])
        return outcome

    monkeypatch.setattr(StepGraphs, "_find", noted_find)
    monkeypatch.setattr(StepGraphs, "decode", noted_decode)
    monkeypatch.setattr(StepGraphs, "prompts", noted_prompts)
    return found


def make_driver(path: str, **options: Any) -> Driver:
    return Driver(path, page_size=PAGE, num_blocks=400, device=DEVICE, **options)


def serve(path: str, ahead: bool, **options: Any) -> dict[int, Track]:
    """The traffic, as a scheduler orders it: tokens one at a time first, then prompts.

    `ahead`: each step is launched before the results of the one before it are taken.
    """
    driver, orders, step = make_driver(path, **options), deque[StepOrder](), 0
    left = dict(enumerate(TRAFFIC))
    while left:
        for key, ask in left.items():
            if ask.at == step:
                blocks = driver.tracks[0].blocks[: ask.shared] if ask.shared else []
                scored = {"logprob_start": 0} if ask.scored else {}
                driver.admit(key, ask.prompt(key), ask.sampling, shared=blocks, **scored)
        due = {key: driver.tracks[key] for key, ask in left.items() if ask.at <= step}
        counts = {key: min(left[key].chunk, len(track.tokens) - track.computed) for key, track in due.items()}
        orders.append(driver.order(dict(sorted(counts.items(), key=lambda item: item[1] > 1))))
        driver.worker.launch(orders[-1])
        for key, track in due.items():
            if len(track.tokens) == left[key].length + left[key].count:
                del left[key]
                driver.release(key)
        while len(orders) > int(ahead):
            driver.take(orders.popleft())
        step += 1
    for order in orders:
        driver.take(order)
    return driver.tracks


@dataclasses.dataclass
class Found:
    """Logprobs that a run gave prompts' tokens and the sampled ones."""

    prompts: Said
    outputs: Said

    @classmethod
    def of(cls, tracks: Mapping[int, Track]) -> Found:
        prompts: Said = {}
        outputs: Said = {}
        for key, track in tracks.items():
            prompts |= {(key, at): value for at, value in track.prompt_logprobs.items() if at}
            outputs |= {(key, TRAFFIC[key].length + at): value for at, value in enumerate(track.logprobs)}
        assert len(prompts) == sum(ask.length - 1 for ask in TRAFFIC if ask.scored)
        assert len(outputs) == sum(ask.count for ask in TRAFFIC if ask.sampling.logprobs)
        return cls(prompts, outputs)


class Judge:
    """Logprobs of transformers along the tokens of a run."""

    def __init__(self, oracle: Oracle, tracks: Mapping[int, Track]) -> None:
        self._tokens = {key: track.tokens for key, track in tracks.items()}
        self._rows = {key: oracle.logprobs(tokens) for key, tokens in self._tokens.items()}

    def errors(self, said: Said) -> Errors:
        return np.array([value - self.of(*place) for place, value in said.items()])

    def of(self, key: int, at: int) -> float:
        return float(self._rows[key][at - 1, self._tokens[key][at]])

    def behind(self, key: int) -> Errors:
        """By how much each sampled token is less likely than the best; 0 where it is that."""
        start = TRAFFIC[key].length
        best = self._rows[key][start - 1 : -1].amax(-1).tolist()
        return np.array([top - self.of(key, at) for at, top in enumerate(best, start)])


def check_float32(
    path: str, tracks: Mapping[int, Track], tolerance: float = TOLERANCE, fp8_scales: Sequence[Scales] | None = None
) -> None:
    judge, found = Judge(Oracle(path, device=DEVICE, fp8_scales=fp8_scales), tracks), Found.of(tracks)
    for said in (found.prompts, found.outputs):
        print(f"at most {most(judge.errors(said)):.2e}, on average {average(judge.errors(said)):.2e}")
        assert most(judge.errors(said)) < tolerance
    for key in GREEDY_KEYS:
        assert judge.behind(key).max() <= (0.0 if fp8_scales is None else 2 * tolerance), (
            f"request {key}: another token than transformers'"
        )


@pytest.mark.parametrize("name", MODELS)
def test_float32_computes_what_transformers_computes(folder: Path, replayed: list[tuple[str, int]], name: str) -> None:
    path = tiny_model(folder, **SHAPE, **MODELS[name])
    step_by_step = serve(path, False, dtype="float32")
    assert not replayed
    check_float32(path, step_by_step)
    ahead = serve(path, True, dtype="float32", graphs=LARGEST)
    check_float32(path, ahead)
    for key in range(len(TRAFFIC)):
        assert ahead[key].emitted == step_by_step[key].emitted, "whatever draws them"
    decoded = {rows for kind, rows in replayed if kind == "decode"}
    assert decoded - set(graph_sizes(LARGEST)), "no batch had to be filled up"
    assert max(decoded) == LARGEST
    assert any(kind == "prompts" for kind, _ in replayed)
    assert [tokens for kind, tokens in replayed if kind == "fresh"] == [1024, 333, 600]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(folder: Path, name: str) -> None:
    path = tiny_model(folder, **SHAPE, **MODELS[name])
    tracks = serve(path, True, graphs=LARGEST)
    found, exact = Found.of(tracks), Judge(Oracle(path, device=DEVICE), tracks)
    theirs = Judge(Oracle(path, dtype="bfloat16", device=DEVICE), tracks)
    worst = 0.0
    for said in (found.prompts, found.outputs):
        ours, other = exact.errors(said), exact.errors({place: theirs.of(*place) for place in said})
        print(f"{name}: at most {most(ours):.4f}, transformers {most(other):.4f};", end=" ")
        print(f"on average {average(ours):.5f}, transformers {average(other):.5f}")
        assert most(ours) <= 2 * most(other) and average(ours) <= 2 * average(other)
        worst = max(worst, 2 * most(other))
    for key in GREEDY_KEYS:
        assert exact.behind(key).max() <= 2 * worst, f"request {key}: a token far from the best"


@pytest.mark.parametrize("name", MODELS)
def test_one_byte_keys_and_values_are_those_that_transformers_is_given(folder: Path, name: str) -> None:
    """In float32, with and without graphs: a key between two numbers of float8 may become the other one."""
    path = tiny_model(folder, **SHAPE, **MODELS[name])
    ones = ((1.0, 1.0),) * SHAPE["num_hidden_layers"]
    for options in ({}, {"graphs": LARGEST}):
        tracks = serve(path, True, dtype="float32", kv_cache_dtype="fp8_e4m3", **options)
        check_float32(path, tracks, FP8_TOLERANCE, ones)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_with_one_byte_keys_and_values_is_as_close_as_transformers_is(folder: Path, name: str) -> None:
    """As close to float32 with rounded keys and values as transformers' bfloat16 with them is."""
    path = tiny_model(folder, **SHAPE, **MODELS[name])
    ones = ((1.0, 1.0),) * SHAPE["num_hidden_layers"]
    tracks = serve(path, True, kv_cache_dtype="fp8_e4m3", graphs=LARGEST)
    found, exact = Found.of(tracks), Judge(Oracle(path, device=DEVICE, fp8_scales=ones), tracks)
    theirs = Judge(Oracle(path, dtype="bfloat16", device=DEVICE, fp8_scales=ones), tracks)
    for said in (found.prompts, found.outputs):
        ours, other = exact.errors(said), exact.errors({place: theirs.of(*place) for place in said})
        print(f"{name}: at most {most(ours):.4f}, transformers {most(other):.4f};", end=" ")
        print(f"on average {average(ours):.5f}, transformers {average(other):.5f}")
        assert most(ours) <= 2 * most(other) and average(ours) <= 2 * average(other)


def most(errors: Errors) -> float:
    return float(np.abs(errors).max())


def average(errors: Errors) -> float:
    """Root mean square."""
    return float(np.square(errors).mean() ** 0.5)


def test_attention_without_kernels_computes_the_same(folder: Path) -> None:
    path = tiny_model(folder, **SHAPE, **MODELS["llama"])
    check_float32(path, serve(path, True, dtype="float32", by_torch=True))


def test_a_steps_digests_are_of_what_it_wrote(folder: Path) -> None:
    """Launched behind it: of blocks that are full and of one that is not."""
    pool: list[torch.Tensor] = []
    driver: Driver = make_driver(
        tiny_model(folder, **SHAPE, **MODELS["llama"]),
        digest=lambda blocks, tokens: PoolDigests(pool[0], DigestGeometry(driver.shape))(blocks, tokens),
    )
    pool.append(driver.pool.memory)
    track = driver.admit(1, TRAFFIC[1].prompt(1))
    done = driver.step({1: 37}, complete_i32=i32(track.blocks), complete_tokens_i32=i32([16, 16, 5]))
    blocks, tokens = (np.array(values, dtype=np.int32) for values in (track.blocks, [16, 16, 5]))
    host = driver.pool.memory.cpu().numpy()
    expected = digest_blocks(host, driver.shape.nbytes, blocks, tokens, DigestGeometry(driver.shape))
    assert np.frombuffer(done.digests_u64, np.uint64).tolist() == expected.tolist()
