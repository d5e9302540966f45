"""Blocks pulled out of another process's GPU memory, and what that costs a decode step beside it.

    python tests/bench/bench_direct_ipc.py [--peer 0] [--pool 1024] [--sizes 32,…] [--programs 4,8,16,32,64]

The other process is on GPU `peer` of those visible; this one is on GPU 0. Three tables, all against one plain copy of
the whole pool (MiB) over the same mapping; GB/s count the payload once.

1. Whole pushes through `direct`: posts here and there, checks, pulls with digests, acknowledgements. The receiver's GPU
   does nothing else, and once it says so (see `CudaPulls`).
2. The pull's kernel by itself, by programs and by the runs of words that a program takes at a time: `--programs`, and
   what is taken on an idle GPU.
3. The same, over and over, beside CUDA graphs of something like a decode step (products with 14 GB of weights in bf16
   at 64 rows, and reads of KV): ms a step alone and beside it, and GB/s pulled meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels.block_copy import copy_share, plan_share  # noqa: E402
from pd.kernels.spans import as_words  # noqa: E402
from pd.kernels.spans_triton import prepare_pass  # noqa: E402
from pd.runner.cuda_ipc import IDLE_PROGRAMS  # noqa: E402
from pd.runner.cuda_memory import CudaMemory, device_bytes  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402
from pd.testing.transfer_peer import RemoteSide  # noqa: E402
from tests.gpu.cuda_side import CudaSide  # noqa: E402

FACTORY = "pd.transfer.plugin:make_direct"
KIB, MIB = 1 << 10, 1 << 20
RUNS = (32, 64, 128)

#: Shapes of the products of one layer (Llama-3.1-8B): QKV, output, gate and up, down.
PRODUCTS = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
LAYERS, BATCH, KV_BYTES = 32, 64, 256 * MIB


def device_seconds(run: Callable[[], object], rounds: int) -> float:
    """Per run on the device, the median of three."""
    return float(np.median(device_times(run, rounds=rounds, repeats=3, warm_up=1)))


class Pulls:
    """The pull's kernel over a whole pool, from random places."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, block: int, runs: int) -> None:
        self._source, self._target, self.nbytes = source, target, source.numel() * 8
        count = self.nbytes // block
        spans = np.zeros((count, 3), dtype=np.int64)
        spans[:, 0] = np.random.default_rng(block).permutation(count) * block
        spans[:, 1], spans[:, 2] = np.arange(count) * block, block
        table = np.zeros((count + 1, 5), dtype=np.int64)
        self._share = plan_share(source, target, spans, np.zeros(count, np.int64), table, runs)
        self._table = torch.from_numpy(table).to(target.device)
        self._digests = torch.zeros(count, dtype=torch.int64, device=target.device)

    def run(self, programs: int) -> None:
        copy_share(self._source, self._target, self._share, self._table, self._digests, programs)


class DecodeStep:
    """A CUDA graph that reads about what a decode step reads."""

    def __init__(self) -> None:
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
        with torch.cuda.graph(self._graph):
            self._step()

    def _step(self) -> None:
        for layer in self._weights:
            for (rows, _), weight in zip(PRODUCTS, layer, strict=True):
                self._inputs[rows] @ weight
            self._read()

    def milliseconds(self, steps: int = 30) -> float:
        """Per step, steps following each other."""
        self._graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / steps


class Background:
    """Pulls over and over on a stream of their own, as `CudaPulls` makes them, until the block ends."""

    def __init__(self, pulls: Pulls, programs: int) -> None:
        self._pulls, self._programs = pulls, programs
        self._end = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rate = 0.0

    def _run(self) -> None:
        stream = torch.cuda.Stream(priority=-1)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        done, count = torch.cuda.Event(blocking=True), 0
        with torch.cuda.stream(stream):
            first.record()
            while not self._end.is_set():
                self._pulls.run(self._programs)
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


def through_direct(remote: RemoteSide, nbytes: int, sizes: list[int], plain: float, here: CudaSide) -> None:
    assert isinstance(here.device, CudaMemory)
    remote.call("connect", here.descriptor())
    way = ", ".join(remote.call("ways"))
    print(f"\n1. through direct ({way}): KiB | GB/s of one push of the pool (ratio) | of four | both while alone")
    for tag, size in enumerate(sizes, 1):
        here.grant(tag, [[0, nbytes]], "P")
        line = f"   {size // KIB:5d}"
        for alone, times in itertools.product((False, True), (1, 4)):
            here.device.pulls.alone = lambda alone=alone: alone  # type: ignore[misc]
            took = sorted(remote.call("send_all", "D", size, tag, times) for _ in range(7))[3]
            rate = times * nbytes / took
            line += f" | {rate / 1e9:5.0f} {rate / plain:5.2f}"
        print(line, flush=True)


def by_programs(
    source: torch.Tensor, target: torch.Tensor, sizes: list[int], programs: list[int], plain: float
) -> None:
    print("\n2. the kernel: KiB, runs a tile | GB/s (ratio) with", ", ".join(map(str, programs)), "programs")
    for size in sizes:
        for runs in RUNS:
            pulls = Pulls(source, target, size, runs)
            line = f"   {size // KIB:5d} {runs:4d}"
            for count in programs:
                rate = pulls.nbytes / device_seconds(lambda c=count, p=pulls: p.run(c), 2)  # type: ignore[misc]
                line += f" | {rate / 1e9:5.0f} {rate / plain:5.2f}"
            print(line, flush=True)


def beside_steps(source: torch.Tensor, target: torch.Tensor, programs: list[int]) -> None:
    step = DecodeStep()
    alone = step.milliseconds()
    print(f"\n3. beside steps of {alone:.3f} ms: runs a tile | slower by, GB/s pulled with", *programs, "programs")
    for runs in RUNS:
        pulls = Pulls(source, target, 4 * MIB, runs)
        line = f"   {runs:4d}"
        for count in programs:
            with Background(pulls, count) as background:
                beside = step.milliseconds()
            line += f" | {beside / alone - 1:6.1%} {background.rate:5.0f}"
        print(line, flush=True)
    print(f"   alone again {step.milliseconds():.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=int, default=0)
    parser.add_argument("--pool", type=int, default=1024)
    parser.add_argument("--sizes", default="32,256,1024,4096")
    parser.add_argument("--programs", default="4,8,16,32,64")
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
        programs = [*(int(one) for one in options.programs.split(",")), IDLE_PROGRAMS * multiprocessors]
        through_direct(remote, nbytes, sizes, plain, here)
        by_programs(source, target, sizes, programs, plain)
        beside_steps(source, target, programs)
        torch.cuda.synchronize()
        mapping.close()
    finally:
        remote.kill()
        here.close()


if __name__ == "__main__":
    main()
