"""What a runner computes on: the CPU with torch's own operations, or one GPU with kernels and captured graphs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from pd.abc import DeviceMemory, TransferBackend
from pd.config import STEP_TOKENS
from pd.errors import ConfigError
from pd.kernels.attention import Heads
from pd.kernels.attention_plan import FRESH_TOKENS
from pd.messages import Push, StepDone, StepOrder
from pd.models.checkpoint import read_checkpoint
from pd.models.registry import Model
from pd.runner.config import RunnerConfig
from pd.runner.cuda_digest import PoolDigests
from pd.runner.cuda_memory import CudaMemory
from pd.runner.device_sampler import DeviceSampler
from pd.runner.device_state import DeviceState
from pd.runner.device_worker import DeviceWorker
from pd.runner.ends import StepEnds
from pd.runner.grammar import Grammars
from pd.runner.graphs import StepGraphs
from pd.runner.kv_pool import KvPool, allocate_region, count_blocks, count_device_blocks, free_memory
from pd.runner.loading import KV_DTYPES, TORCH_DTYPES, load_model
from pd.runner.memory import HostMemory
from pd.runner.warm_up import warm_sampler, warm_up
from pd.runner.worker import Worker
from pd.screen import GRAPHS, KERNELS, WEIGHTS, Report, Stage
from pd.transfer.digest import DigestGeometry, digest_blocks
from pd.types import BlockShape, ModelInfo

#: Models with fewer bytes of weights compute faster on one thread than on several that wait for each other.
SMALL_MODEL = 256 << 20

#: Prompts of the first steps and the tokens before them: one per way through a GPU's attention.
WARM_PROMPTS = ((4, 0), (32, 2048), (1120, 0), (8192, 0))

#: Rows of the first samples: few go another way than many.
WARM_ROWS = (1, 32)

#: Of the first GPUs whose instructions convert FP8.
FP8_CAPABILITY = (8, 9)

#: Tokens of a prompt that one step may take, by default.
LONGEST_STEP = STEP_TOKENS["cuda"][0]

#: Cores per GPU from which on one of them may do nothing but wait for it.
SPIN_CORES = 4

Log = Callable[..., None]


class StepWorker(Protocol):
    def step(self, order: StepOrder) -> StepDone: ...

    def launch(self, order: StepOrder) -> None: ...

    def finish(self) -> StepDone: ...


class Device(Protocol):
    """Called in this order: `load`, `make_pool`, `make_worker`. `memory` is what the data plane reaches the pool by."""

    @property
    def memory(self) -> DeviceMemory: ...

    def load(self, info: ModelInfo, builders: Mapping[str, str], log: Log) -> None: ...

    def make_pool(self, info: ModelInfo, backend: TransferBackend | None) -> KvPool: ...

    def make_worker(
        self, info: ModelInfo, push: Callable[[Push], None] | None, grammars: Grammars, ends: StepEnds, log: Log
    ) -> StepWorker: ...


def open_device(config: RunnerConfig, report: Report = lambda stage, done, total: None) -> Device:
    """`report` is told how far start-up is. Raises ConfigError when the device is not there."""
    there = torch.cuda.is_available()
    if config.model.device == "cpu" or (config.model.device == "auto" and not there):
        return Cpu(config, report)
    if not there:
        raise ConfigError(
            "--device", "cuda: torch finds no GPU here", "use --device cpu, or install a build of torch with CUDA"
        )
    index = config.model.base_gpu_id + config.rank
    if index >= torch.cuda.device_count():
        raise ConfigError("--base-gpu-id", f"GPU {index}: {torch.cuda.device_count()} are visible here")
    return Gpu(config, report, index)


class Cpu:
    def __init__(self, config: RunnerConfig, report: Report) -> None:
        self.memory = HostMemory()
        self._config, self._report = config, report

    def load(self, info: ModelInfo, builders: Mapping[str, str], log: Log) -> None:
        dummy = self._config.model.load_format == "dummy"
        nbytes = 0 if dummy else sum(size for _, size in read_checkpoint(info.path).files.values())
        if self._config.threads > 0:
            torch.set_num_threads(self._config.threads)
        elif nbytes < SMALL_MODEL:
            torch.set_num_threads(1)
        self._model = _load(info, builders, None, log, self._report, dummy=dummy)

    def make_pool(self, info: ModelInfo, backend: TransferBackend | None) -> KvPool:
        cache, shape = self._config.cache, block_shape(info, self._config.cache.page_size)
        blocks = count_blocks(
            shape,
            max_total_tokens=cache.max_total_tokens,
            fraction=cache.mem_fraction_static,
            free_bytes=free_memory(),
        )
        region = allocate_region(blocks * shape.nbytes, backend.allocate if backend is not None else None)
        self._pool = KvPool(region, shape, blocks, KV_DTYPES[info.cache_dtype], info.kv_scales)
        return self._pool

    def make_worker(
        self, info: ModelInfo, push: Callable[[Push], None] | None, grammars: Grammars, ends: StepEnds, log: Log
    ) -> Worker:
        pool, geometry = self._pool, DigestGeometry(self._pool.shape)
        worker = Worker(
            self._model,
            pool,
            vocab_size=info.vocab_size,
            rank=self._config.rank,
            digest=lambda ids, tokens: digest_blocks(pool.bytes, pool.shape.nbytes, ids, tokens, geometry),
            push=push,
            grammars=grammars,
            ended=ends.launched,
        )
        stage = Stage(self._report, KERNELS, 1)
        warm_up(worker, 4)
        stage.end()
        return worker


class Gpu:
    def __init__(self, config: RunnerConfig, report: Report, index: int) -> None:
        self._config, self._report, self._device = config, report, torch.device("cuda", index)
        torch.cuda.set_device(self._device)
        self._free_before = torch.cuda.mem_get_info(self._device)[0]
        self._worker: DeviceWorker | None = None
        self.memory = CudaMemory(index, alone=lambda: self._worker is None or not self._worker.busy)

    def load(self, info: ModelInfo, builders: Mapping[str, str], log: Log) -> None:
        model = self._config.model
        if info.kv_dtype and torch.cuda.get_device_capability(self._device) < FP8_CAPABILITY:
            raise ConfigError("--kv-cache-dtype", f"{info.kv_dtype} needs an NVIDIA GPU with FP8: Ada, Hopper or later")
        dummy = model.load_format == "dummy"
        self._model = _load(info, builders, self._device, log, self._report, dummy=dummy)

    def make_pool(self, info: ModelInfo, backend: TransferBackend | None) -> KvPool:
        cache, shape = self._config.cache, block_shape(info, self._config.cache.page_size)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        blocks = count_device_blocks(
            shape,
            max_total_tokens=cache.max_total_tokens,
            fraction=cache.mem_fraction_static,
            free_before=self._free_before,
            free_bytes=torch.cuda.mem_get_info(self._device)[0],
        )
        supply = backend.allocate if backend is not None else None
        region = allocate_region(blocks * shape.nbytes, supply, str(self._device))
        self._pool = KvPool(region, shape, blocks, KV_DTYPES[info.cache_dtype], info.kv_scales)
        return self._pool

    def make_worker(
        self, info: ModelInfo, push: Callable[[Push], None] | None, grammars: Grammars, ends: StepEnds, log: Log
    ) -> DeviceWorker:
        config, pool = self._config, self._pool
        by_torch = config.model.attention_backend == "torch"
        width = -(-info.context_length // pool.shape.tokens) + 1
        # As many requests as decode at once, and prompts that a released one has not left yet.
        state = DeviceState(2 * config.max_running, width, info.num_kv_heads, info.vocab_size, self._device)
        worker = DeviceWorker(
            self._model,
            pool,
            state,
            vocab_size=info.vocab_size,
            group=info.num_heads // info.num_kv_heads,
            rank=config.rank,
            digest=PoolDigests(pool.memory, DigestGeometry(pool.shape)),
            push=push,
            grammars=grammars,
            by_torch=by_torch,
            spin=spins(config.model.device_wait, len(os.sched_getaffinity(0)), torch.cuda.device_count()),
        )
        self._warm(worker, info, not by_torch and info.dtype != "float32", log)
        graphs = None
        if not config.model.disable_cuda_graph and not by_torch:
            started = time.monotonic()
            largest = min(config.model.cuda_graph_max_bs, config.max_running)
            with torch.inference_mode():
                graphs = StepGraphs(
                    self._model,
                    pool,
                    state,
                    batch=largest,
                    group=info.num_heads // info.num_kv_heads,
                    progress=Stage(self._report, GRAPHS),
                )
            log("graphs captured", seconds=round(time.monotonic() - started, 2), largest=largest)
        worker.start(graphs, ends.launched)
        if not by_torch:
            from pd.kernels.launch import watch_compilation  # needs triton

            watch_compilation(lambda kernel: log("kernel compiled while serving", kernel=kernel))
        self._worker = worker
        return worker

    def _warm(self, worker: DeviceWorker, info: ModelInfo, plans: bool, log: Log) -> None:
        """The first steps compile kernels. `plans`: cuDNN attends to prompts, too."""
        started = time.monotonic()
        prompts = [(prompt, prefix) for prompt, prefix in WARM_PROMPTS if prefix + prompt < info.context_length]
        total = len(prompts) + plans + 1
        stage = Stage(self._report, KERNELS, total)
        if plans:
            _plan_attention(info, self._device)
            stage(1, total)
        for done, (prompt, prefix) in enumerate(prompts, start=1 + plans):
            warm_up(worker, prompt, prefix)
            stage(done, total)
        self._warm_sampler(worker.sampler, info)
        stage(total, total)
        log("kernels compiled", seconds=round(time.monotonic() - started, 2))

    @torch.inference_mode()
    def _warm_sampler(self, sampler: DeviceSampler, info: ModelInfo) -> None:
        for rows in sorted({min(rows, sampler.state.slots) for rows in WARM_ROWS}):
            hidden = torch.zeros(rows, info.hidden_size, dtype=TORCH_DTYPES[info.dtype], device=self._device)
            warm_sampler(sampler, self._model.logits(hidden))


def spins(wait: str, cores: int, gpus: int) -> bool:
    """What `--device-wait` means where this process may use `cores` cores and sees `gpus` GPUs."""
    return wait == "spin" or (wait == "auto" and cores >= SPIN_CORES * gpus)


@torch.inference_mode()
def _plan_attention(info: ModelInfo, device: torch.device) -> None:
    """cuDNN makes a plan for each length and number of prompts: now, and not while somebody waits."""
    most = min(LONGEST_STEP, info.context_length)
    counts = info.num_heads, info.num_kv_heads, info.num_kv_heads
    fused = torch.zeros(
        max(most, FRESH_TOKENS), sum(counts), info.head_dim, dtype=TORCH_DTYPES[info.dtype], device=device
    )
    from pd.kernels.attention_device import warm_fresh  # needs triton

    warm_fresh(Heads(*fused.split(counts, dim=1)), info.head_dim**-0.5, most)


def _load(
    info: ModelInfo,
    builders: Mapping[str, str],
    device: torch.device | None,
    log: Log,
    report: Report,
    *,
    dummy: bool,
) -> Model:
    log("loading model", model=info.name, architecture=info.architecture, dtype=info.dtype, dummy=dummy)
    started = time.monotonic()
    stage = Stage(report, WEIGHTS)
    model = load_model(info, builders, device=device, progress=stage, dummy=dummy)
    stage.end()
    log("model loaded", seconds=round(time.monotonic() - started, 2), threads=torch.get_num_threads())
    return model


def block_shape(info: ModelInfo, page_size: int) -> BlockShape:
    itemsize = KV_DTYPES[info.cache_dtype].itemsize
    return BlockShape(page_size, info.num_kv_heads, info.num_layers, info.head_dim, itemsize)


def mib(nbytes: int) -> float:
    return round(nbytes / 2**20, 1)
