"""Drives a runner's worker the way a scheduler does, with the bookkeeping that a test needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pd.messages import Admit, CopyBlock, StepDone, StepOrder, TokenLogprobs
from pd.models.dense import DENSE_ARCHITECTURES
from pd.models.info import check_model
from pd.models.registry import Model
from pd.runner.device import block_shape
from pd.runner.device_state import DeviceState
from pd.runner.device_worker import DeviceWorker
from pd.runner.graphs import StepGraphs
from pd.runner.kv_pool import KvPool, allocate_region
from pd.runner.loading import KV_DTYPES, load_model
from pd.runner.worker import Worker
from pd.types import ModelInfo, SamplingParams

BUILDERS = dict.fromkeys(DENSE_ARCHITECTURES, "pd.models.llama:build")
GREEDY = SamplingParams(temperature=0.0, logprobs=True)


def i32(values: Sequence[int]) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


def i64(values: Sequence[int]) -> bytes:
    return np.array(values, dtype=np.int64).tobytes()


def f32(data: bytes) -> Any:
    return np.frombuffer(data, dtype=np.float32)


@dataclass
class Track:
    """What the test knows of one request."""

    key: int
    epoch: int
    tokens: list[int]
    computed: int
    blocks: list[int]
    emitted: list[int] = field(default_factory=list)
    choices: list[list[int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    said: list[TokenLogprobs] = field(default_factory=list)  # of each step that was asked for any
    prompt_logprobs: dict[int, float] = field(default_factory=dict)


#: What a Driver's worker is: the CPU's own, or the GPU's with the references of its kernels.
KIND = ContextVar("kind", default="host")


def make_worker(
    model: Model, pool: KvPool, info: ModelInfo, *, graphs: int = 0, slots: int = 64, **options: Any
) -> Worker | DeviceWorker:
    """`graphs`: the largest decode batch that is captured, of 0 none; `slots`: requests that a GPU has room for."""
    device = pool.memory.device
    if KIND.get() == "host" and device.type == "cpu":
        return Worker(model, pool, vocab_size=info.vocab_size, **options)
    width = -(-info.context_length // pool.shape.tokens) + 1
    digest = options.get("digest")
    if digest is not None and device.type == "cpu":
        options["digest"] = lambda blocks, tokens: torch.from_numpy(digest(blocks, tokens).view(np.int64))
    state = DeviceState(slots, width, info.num_kv_heads, info.vocab_size, device)
    group = info.num_heads // info.num_kv_heads
    worker = DeviceWorker(model, pool, state, vocab_size=info.vocab_size, group=group, **options)
    if graphs:
        with torch.inference_mode():
            captured = StepGraphs(model, pool, state, batch=graphs, group=group, progress=lambda done, total: None)
        worker.start(captured, lambda event: None)
    return worker


class Driver:
    """One worker over a pool of `num_blocks` blocks of `page_size` tokens, filled with NaN so that stale KV shows."""

    def __init__(
        self,
        path: str,
        *,
        page_size: int = 16,
        num_blocks: int = 256,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        device: str = "cpu",
        **worker: Any,
    ) -> None:
        """`device`: "cpu" or "cuda:N"; `worker`: options of `make_worker` and of what it makes."""
        self.info: ModelInfo = check_model(path, dtype=dtype, kv_cache_dtype=kv_cache_dtype, tokenizer=False)
        self.shape = block_shape(self.info, page_size)
        region = allocate_region(num_blocks * self.shape.nbytes, device=device)
        self.pool = KvPool(region, self.shape, num_blocks, KV_DTYPES[self.info.cache_dtype], self.info.kv_scales)
        if self.shape.itemsize == 1:
            self.pool.memory.fill_(0x7F)  # float8's NaN
        else:
            self.pool.tensor.fill_(float("nan"))
        model = load_model(self.info, BUILDERS, device=torch.device(device))
        self.worker = make_worker(model, self.pool, self.info, **worker)
        self.free = list(np.random.default_rng(5).permutation(np.arange(1, num_blocks)).tolist())
        self.tracks: dict[int, Track] = {}
        self._admit: list[Admit] = []
        self._release: list[int] = []
        self._step = 0

    def admit(
        self,
        key: int,
        tokens: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        prompt_len: int | None = None,
        shared: Sequence[int] = (),
        computed: int | None = None,
        epoch: int = 1,
        **fields: Any,
    ) -> Track:
        """With the next step. `shared` are blocks whose KV exists; `computed` defaults to all that they hold."""
        size = self.shape.tokens
        blocks = [*shared]
        while len(blocks) * size < len(tokens):
            blocks.append(self.free.pop())
        done = min(len(shared) * size, len(tokens) - 1) if computed is None else computed
        length = len(tokens) if prompt_len is None else prompt_len
        self._admit.append(Admit(key, epoch, i32(tokens), length, done, i32(blocks), sampling, **fields))
        self.tracks[key] = Track(key, epoch, list(tokens), done, blocks)
        return self.tracks[key]

    def release(self, key: int) -> None:
        self._release.append(key)

    def order(self, counts: dict[int, int], copies: Sequence[CopyBlock] = (), **fields: Any) -> StepOrder:
        """The next order: `counts[key]` tokens each; sampled where that reaches the last known token.

        The driver counts a sampled token as known at once, as a scheduler that runs one step ahead does.
        """
        self._step += 1
        samples, grow_keys, grow_blocks = [], [], []
        for key, count in counts.items():
            track = self.tracks[key]
            track.computed += count
            samples.append(track.computed == len(track.tokens))
            if samples[-1]:
                track.tokens.append(-1)
            while len(track.blocks) * self.shape.tokens < track.computed:
                track.blocks.append(self.free.pop())
                grow_keys.append(key)
                grow_blocks.append(track.blocks[-1])
        admit, self._admit = self._admit, []
        release, self._release = self._release, []
        return StepOrder(
            step=self._step,
            rows_i64=i64(list(counts)),
            counts_i32=i32(list(counts.values())),
            sample_u8=bytes(samples),
            release=release,
            admit=admit,
            grow_keys_i64=i64(grow_keys),
            grow_blocks_i32=i32(grow_blocks),
            copies=list(copies),
            **fields,
        )

    def run(self, order: StepOrder) -> StepDone:
        self.worker.launch(order)
        return self.take(order)

    def take(self, order: StepOrder) -> StepDone:
        """The results of the oldest order that was launched: this one."""
        done = self.worker.finish()
        assert done.step == order.step and done.keys_i64 == order.rows_i64
        keys = np.frombuffer(done.keys_i64, np.int64).tolist()
        tokens = iter(np.frombuffer(done.tokens_i32, np.int32).tolist())
        for key, epoch, count in zip(keys, np.frombuffer(done.epochs_i32, np.int32), done.counts_u8, strict=True):
            track = self.tracks[key]
            assert epoch == track.epoch
            some = [next(tokens) for _ in range(count)]
            if some:
                track.choices.append(some)
                track.tokens[track.tokens.index(-1)] = some[0]
                track.emitted.append(some[0])
        for row in done.logprobs:
            self.tracks[keys[row.index]].logprobs.extend(f32(row.logprobs.chosen_f32).tolist())
            self.tracks[keys[row.index]].said.append(row.logprobs)
        for prompt in done.prompt_logprobs:
            values = f32(prompt.logprobs.logprobs_f32).tolist()
            known = self.tracks[keys[prompt.index]].prompt_logprobs
            known.update(zip(range(prompt.logprobs.start, prompt.logprobs.start + len(values)), values, strict=True))
        return done

    def step(self, counts: dict[int, int], **fields: Any) -> StepDone:
        return self.run(self.order(counts, **fields))

    def generate(self, n: int, chunk: int = 1 << 30) -> None:
        """Run every admitted request to `n` emitted tokens; prompts in chunks of at most `chunk` tokens per step."""
        while live := [track for track in self.tracks.values() if len(track.emitted) < n]:
            self.step({track.key: min(chunk, len(track.tokens) - track.computed) for track in live})
