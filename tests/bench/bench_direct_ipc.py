"""Blocks pulled out of another process's GPU memory, and what that costs a decode step beside it.

    python tests/bench/bench_direct_ipc.py [--peer 0] [--pool 1024] [--sizes 32,256,4096] [--programs 4,6,8,16,32]

The other process is on GPU `peer` of those visible; this one is on GPU 0. Three tables, all against one plain copy of
the whole pool (MiB) over the same mapping; GB/s count the payload once.

1. The pull's kernel by itself over the whole pool, by its form (runs of words that a program takes at a time / warps)
   and by programs: those of `--programs`, and 6, 12, 24, 48 for each multiprocessor.
2. The same, over and over, beside CUDA graphs of something like a decode step (products with 14 GB of weights in bf16
   at 64 rows, and reads of KV), blocks of 4 MiB: how much slower the step is, and GB/s pulled meanwhile. By which goes
   first, as the priorities of their streams say: the pull, neither, the step.
3. Whole pushes through `direct` as it is: posts here and there, checks, pulls with digests, acknowledgements. On a GPU
   without steps, one push and four at a time; and beside the steps, with what that costs them.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels.block_copy import copy_share, plan_share  # noqa: E402
from pd.kernels.spans import Form, as_words  # noqa: E402
from pd.kernels.spans_triton import prepare_pass  # noqa: E402
from pd.runner.cuda_memory import CudaMemory, device_bytes  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402
from pd.testing.transfer_peer import RemoteSide  # noqa: E402
from tests.gpu.cuda_side import CudaSide  # noqa: E402

FACTORY = "pd.transfer.plugin:make_direct"
KIB, MIB = 1 << 10, 1 << 20
FORMS = (Form(32, 4), Form(64, 4), Form(64, 8), Form(128, 8))
EACH = (6, 12, 24, 48)  # programs for each multiprocessor

#: What goes first: priorities of the pull's stream and of the step's; a lower number goes first.
FIRST = {"pull": (-1, 0), "neither": (0, 0), "step": (0, -1)}

#: Shapes of the products of one layer (Llama-3.1-8B): QKV, output, gate and up, down.
PRODUCTS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
LAYERS, BATCH, KV_BYTES = 32, 64, 256 * MIB


def device_seconds(run: Callable[[], object], rounds: int) -> float:
    """Per run on the device, the median of three."""
    return float(np.median(device_times(run, rounds=rounds, repeats=3, warm_up=1)))


class Pulls:
    """The pull's kernel over a whole pool, from random places."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, block: int) -> None:
        self._source, self._target, self.nbytes = source, target, source.numel() * 8
        count = self.nbytes // block
        spans = np.zeros((count, 3), dtype=np.int64)
        spans[:, 0] = np.random.default_rng(block).permutation(count) * block
        spans[:, 1], spans[:, 2] = np.arange(count) * block, block
        table = np.zeros((5, count + 1), dtype=np.int64)
        self._share = plan_share(source, target, spans, np.zeros(count, np.int64), table)
        self._table = torch.from_numpy(table).to(target.device)
        self._digests = torch.zeros(count, dtype=torch.int64, device=target.device)

    def run(self, programs: int, form: Form) -> None:
        copy_share(self._source, self._target, self._share, self._table, self._digests, programs, form)


class DecodeStep:
    """A CUDA graph that reads about what a decode step reads, on a stream of a priority."""

    def __init__(self, priority: int) -> None:
        self._stream = torch.cuda.Stream(priority=priority)
        self._weights = [
            [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(0.01) for rows, columns in PRODUCTS]
            for _ in range(LAYERS)
        ]
        self._inputs = {rows: torch.randn(BATCH, rows, device="cuda", dtype=torch.bfloat16) for rows, _ in PRODUCTS}
        kv = torch.zeros(KV_BYTES // 8, dtype=torch.int64, device="cuda")
        spans = np.zeros((KV_BYTES // MIB, 4), dtype=np.int64)
        spans[:, 0], spans[:, 2] = np.arange(len(spans)) * MIB // 8, MIB // 8
        self._read = prepare_pass(kv, None, spans, torch.zeros(len(spans), dtype=torch.int64, device="cuda"))
        self._step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):  # whose priority its kernels keep
            self._step()

    def _step(self) -> None:
        for layer in self._weights:
            for (rows, _), weight in zip(PRODUCTS, layer, strict=True):
                self._inputs[rows] @ weight
            self._read()

    def milliseconds(self, steps: int = 30) -> float:
        """Per step, steps following each other."""
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                self._graph.replay()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / steps


class Background:
    """Pulls over and over on a stream of their own until the block ends."""

    def __init__(self, pulls: Pulls, programs: int, form: Form, priority: int) -> None:
        self._pulls, self._programs, self._form, self._priority = pulls, programs, form, priority
        self._end = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rate = 0.0

    def _run(self) -> None:
        stream = torch.cuda.Stream(priority=self._priority)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        done, count = torch.cuda.Event(blocking=True), 0
        with torch.cuda.stream(stream):
            first.record()
            while not self._end.is_set():
                self._pulls.run(self._programs, self._form)
                done.record()
                done.synchronize()
                count += 1
                self._started.set()
            last.record()
            last.synchronize()
        self.rate = count * self._pulls.nbytes / first.elapsed_time(last) / 1e6

    def __enter__(self) -> Background:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def by_programs(
    source: torch.Tensor, target: torch.Tensor, sizes: list[int], programs: list[int], plain: float
) -> None:
    print("\n1. the kernel: KiB, runs/warps | GB/s (ratio) with", ", ".join(map(str, programs)), "programs")
    for size in sizes:
        pulls = Pulls(source, target, size)
        for form in FORMS:
            line = f"   {size // KIB:5d} {form.rows:4d}/{form.warps}"
            for count in programs:
                rate = pulls.nbytes / device_seconds(lambda c=count, f=form, p=pulls: p.run(c, f), 2)  # type: ignore[misc]
                line += f" | {rate / 1e9:5.0f} {rate / plain:5.3f}"
            print(line, flush=True)


def beside_steps(source: torch.Tensor, target: torch.Tensor, programs: list[int]) -> None:
    pulls = Pulls(source, target, 4 * MIB)
    for first, (pull, priority) in FIRST.items():
        step = DecodeStep(priority)
        alone = step.milliseconds()
        print(f"\n2. beside steps of {alone:.3f} ms, first goes: {first}. runs/warps | slower by, GB/s with", *programs)
        for form in FORMS:
            line = f"   {form.rows:4d}/{form.warps}"
            for count in programs:
                with Background(pulls, count, form, pull) as background:
                    beside = step.milliseconds(20)
                line += f" | {beside / alone - 1:6.1%} {background.rate:5.0f}"
            print(line, flush=True)
        print(f"   alone again {step.milliseconds():.3f} ms")
        del step
        torch.cuda.empty_cache()


class Pushes:
    """Whole pushes of the pool through `direct`, from the other process to this one."""

    def __init__(self, remote: RemoteSide, here: CudaSide, nbytes: int, size: int, tag: int) -> None:
        here.grant(tag, [[0, nbytes]], "P")
        self._remote, self._nbytes, self._size, self._tag = remote, nbytes, size, tag

    def rate(self, times: int) -> float:
        """Bytes a second of so many pushes, posted as the transfer core does."""
        took: float = self._remote.call("send_all", "D", self._size, self._tag, times)
        return times * self._nbytes / took

    def beside(self, step: DecodeStep, seconds: float, expected: float) -> tuple[float, float]:
        """Bytes a second, and ms of a step meanwhile, for about so long if they come at the `expected` rate."""
        rates: list[float] = []
        times = max(4, int(seconds * expected / self._nbytes))
        sending = threading.Thread(target=lambda: rates.append(self.rate(times)))
        sending.start()
        time.sleep(0.01)
        milliseconds = step.milliseconds(20)
        sending.join()
        return rates[0], milliseconds


def through_direct(remote: RemoteSide, nbytes: int, sizes: list[int], plain: float, here: CudaSide) -> None:
    assert isinstance(here.device, CudaMemory)
    remote.call("connect", here.descriptor())
    way, step = ", ".join(remote.call("ways")), DecodeStep(0)
    alone = step.milliseconds()
    print(f"\n3. through direct ({way}): KiB | GB/s (ratio) of one push of the pool | of four | ", end="")
    print(f"beside steps of {alone:.3f} ms | slower by")
    for tag, size in enumerate(sizes, 1):
        pushes = Pushes(remote, here, nbytes, size, tag)
        here.device.pulls.alone = lambda: True
        rates = [float(np.median([pushes.rate(times) for _ in range(9)])) for times in (1, 4)]
        here.device.pulls.alone = lambda: False
        rate, _ = pushes.beside(step, 0.1, plain / 10)
        rate, beside = pushes.beside(step, 40 * alone / 1e3, rate)  # until after the last step
        found = " | ".join(f"{one / 1e9:5.0f} {one / plain:5.3f}" for one in (*rates, rate))
        print(f"   {size // KIB:5d} | {found} | {beside / alone - 1:6.1%}", flush=True)
        here.take_digests(tag, "P")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=int, default=0)
    parser.add_argument("--pool", type=int, default=1024)
    parser.add_argument("--sizes", default="32,256,4096")
    parser.add_argument("--programs", default="4,6,8,16,32")
    options = parser.parse_args()
    nbytes, sizes = options.pool * MIB, [int(one) * KIB for one in options.sizes.split(",")]
    with mock.patch.dict(os.environ, PD_TEST_CUDA_DEVICE=str(options.peer)):
        remote = RemoteSide(FACTORY, "127.0.0.1", "", {}, module="tests.gpu.cuda_side")
    here = CudaSide(FACTORY, "127.0.0.1", "", {})
    try:
        remote.call("open", "P", nbytes, 4 * MIB, timeout=120.0)
        here.open("D", nbytes, 4 * MIB)
        assert isinstance(here.device, CudaMemory)
        mapping = here.device.open(bytes.fromhex(remote.call("handle")), [nbytes])
        source, target = mapping.words[0], as_words(device_bytes(here.region))
        plain = nbytes / device_seconds(lambda: target.copy_(source), 3)
        print(torch.cuda.get_device_name(), "torch", torch.__version__, f"peer {options.peer}")
        print(f"plain copy of {options.pool} MiB over the mapping: {plain / 1e9:.0f} GB/s")
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        few = [int(one) for one in options.programs.split(",")]
        many = [each * multiprocessors for each in EACH]
        by_programs(source, target, sizes, [*few, *many], plain)
        through_direct(remote, nbytes, sizes, plain, here)
        beside_steps(source, target, [*few, many[0], many[2]])
        torch.cuda.synchronize()
        mapping.close()
    finally:
        remote.kill()
        here.close()


if __name__ == "__main__":
    main()
