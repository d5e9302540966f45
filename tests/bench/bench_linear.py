"""How fast the projections of Llama-3.1-8B read their weights at few rows, by launch configuration, beside cuBLAS.

    python tests/bench/bench_linear.py [--seconds 180] [--rows 1,8,32,64,128,256] [--out linear.json] [--quick]

First every shape alone: a CUDA graph over copies of the weight that together exceed the L2, for many configurations of
`linear_triton`, each checked against float32 and for being the same twice. Then the chain: 32 layers of qkv, o, gate-up
and down, each reading what the one before wrote: with cuBLAS, with what pd launches ("table"), with the best
configurations, these with programmatic dependent launch, and cuBLAS for some of them ("mixed"). Processes compile ahead
while the GPU measures. The table counts the bytes of the weights; the floor is those by FLOOR_TBPS. `--out` gets every
measurement, also when time runs out: configurations are tried in a shuffled order. `--quick` tries few of them, also
for the shapes of other models.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels import linear_triton  # noqa: E402
from pd.kernels.linear_configs import Config, Row, Stream, config_for  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402
from tests.bench.linear_jobs import (  # noqa: E402
    LAYER,
    PROCESSORS,
    SHAPES,
    Job,
    all_jobs,
    quick_jobs,
    shared_bytes,
    table_jobs,
)

LAYERS = 32
CHAIN_ROWS = (1, 8, 64, 32, 128, 16, 256)
FLOOR_TBPS = 4.19
#: Bytes of weights that one replay of a graph reads, about.
REPLAY_BYTES = 1.2e9
FEW = 4


# Compiling, in processes without a GPU


class _Hopper:
    """Stands for Triton's driver where nothing is launched."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class _CompileOnly:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def _start_compiler() -> None:
    triton.runtime.driver.set_active(_Hopper())
    linear_triton.stream = _CompileOnly(linear_triton.stream)
    linear_triton.row = _CompileOnly(linear_triton.row)
    linear_triton._processors = lambda device: PROCESSORS
    torch.set_num_threads(1)


def _compile(job: Job) -> str | None:
    """The machine code is left in Triton's cache; what went wrong, if something did."""
    n, k = SHAPES[job.shape]
    x = torch.empty(job.rows, k, dtype=torch.bfloat16)
    weight = torch.empty(k, dtype=torch.bfloat16).expand(n, k)
    try:
        linear_triton.launch(x, weight, None, job.config)
    except Exception as error:  # a configuration that does not compile is a result
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _problem(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return "a compiler process died"


class Compilers:
    """Start before the GPU is touched: the processes are forked."""

    def __init__(self, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, initializer=_start_compiler)
        self._pool.submit(os.getpid).result()

    def by_variant(self, jobs: list[Job], left: Callable[[], float]) -> Iterator[tuple[list[Job], str | None]]:
        """Jobs that share machine code, as it is there; ends early when no seconds are `left`."""
        groups: dict[tuple[Any, ...], list[Job]] = defaultdict(list)
        for job in jobs:
            groups[job.variant()].append(job)
        order = list(groups.values())
        random.Random(7).shuffle(order)
        futures: dict[Future[str | None], list[Job]] = {self._pool.submit(_compile, group[0]): group for group in order}
        try:
            for future in as_completed(futures, timeout=max(left(), 1)):
                yield futures[future], _problem(future)
                if left() <= 0:
                    break
        except TimeoutError:
            pass
        for future in futures:
            future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


# Measuring


class Bench:
    def __init__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        torch.cuda.init()
        torch.manual_seed(1)
        self._weights: dict[str, torch.Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper = torch.cuda.CUDAGraph()  # as long as a graph has it, the next ones reuse the pool's memory
        self._keeper.capture_begin(self._pool)
        torch.zeros(1, device="cuda")
        self._keeper.capture_end()
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}
        self._expected: dict[tuple[str, int], torch.Tensor] = {}

    def x(self, rows: int, k: int) -> torch.Tensor:
        if (rows, k) not in self._inputs:
            self._inputs[rows, k] = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
        return self._inputs[rows, k]

    def weights(self, shape: str) -> torch.Tensor:
        """Copies of a weight, more than the L2 holds."""
        if shape not in self._weights:
            n, k = SHAPES[shape]
            count = LAYERS if shape in LAYER else max(1, round(REPLAY_BYTES / (n * k * 2)))
            weights = torch.empty(count, n, k, dtype=torch.bfloat16, device="cuda")
            for one in weights:
                one.normal_(std=k**-0.5)
            self._weights[shape] = weights
        return self._weights[shape]

    def expected(self, shape: str, rows: int) -> torch.Tensor:
        """Of the first copy of the weight, in float32."""
        if (shape, rows) not in self._expected:
            _, k = SHAPES[shape]
            result = torch.nn.functional.linear(self.x(rows, k).float(), self.weights(shape)[0].float())
            self._expected[shape, rows] = result
        return self._expected[shape, rows]

    def seconds(self, run: Callable[[], object], replays: int = 6, repeats: int = 3) -> float:
        """Of one replay of `run`, captured; the median of `repeats`."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        graph.capture_begin(self._pool)
        run()
        graph.capture_end()
        return statistics.median(device_times(graph.replay, rounds=replays, repeats=repeats, warm_up=1))

    def alone(self, shape: str, rows: int, call: Callable[[torch.Tensor, torch.Tensor], object]) -> float:
        """Seconds of one call."""
        n, k = SHAPES[shape]
        weights = self.weights(shape)
        count = min(len(weights), max(1, round(REPLAY_BYTES / (n * k * 2))))
        x = self.x(rows, k)
        call(x, weights[0])
        return self.seconds(lambda: [call(x, weights[i]) for i in range(count)]) / count

    def check(self, job: Job) -> dict[str, Any]:
        """Relative error of the result, and whether it is the same twice."""
        _, k = SHAPES[job.shape]
        expected = self.expected(job.shape, job.rows)
        x, weight = self.x(job.rows, k), self.weights(job.shape)[0]
        del_me = torch.full_like(expected, float("nan"), dtype=torch.bfloat16)
        del del_me  # what is not written shows
        first = linear_triton.launch(x, weight, None, job.config)
        second = linear_triton.launch(x, weight, None, job.config)
        error = (first.float() - expected).norm() / expected.norm()
        return {"error": float(error), "same": torch.equal(first, second)}

    def measure(self, job: Job) -> dict[str, Any]:
        record = describe(job)
        try:
            record |= self.check(job)
            if not record["same"] or not record["error"] < 4e-3:
                return record | {"failed": "wrong"}
            taken = self.alone(job.shape, job.rows, lambda x, w: linear_triton.launch(x, w, None, job.config))
            return record | {"us": taken * 1e6, "tbps": tbps(job.shape, taken)}
        except Exception as error:  # too much shared memory, say: a result
            return record | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}

    def library(self, shape: str, rows: int) -> dict[str, Any]:
        """What torch's own takes."""
        taken = self.alone(shape, rows, torch.nn.functional.linear)
        return {"shape": shape, "rows": rows, "kind": "cublas", "us": taken * 1e6, "tbps": tbps(shape, taken)}

    def chain(self, rows: int, configs: dict[str, Config | None]) -> float:
        """Seconds of LAYERS layers, in the order of `configs`; None is cuBLAS. gate-up's first half is down's input."""

        def run() -> None:
            hidden = self.x(rows, 4096)
            for layer in range(LAYERS):
                for shape, config in configs.items():
                    k = SHAPES[shape][1]
                    x, weight = hidden[:, :k], self.weights(shape)[layer]
                    if config is None:
                        hidden = torch.nn.functional.linear(x, weight)
                    else:
                        hidden = linear_triton.launch(x, weight, None, config)

        run()
        return self.seconds(run, replays=2)


def tbps(shape: str, seconds: float) -> float:
    n, k = SHAPES[shape]
    return n * k * 2 / seconds / 1e12


def describe(job: Job) -> dict[str, Any]:
    kind = "row" if isinstance(job.config, Row) else "stream"
    return {"shape": job.shape, "rows": job.rows, "kind": kind, "config": asdict(job.config)}


def config_of(record: dict[str, Any]) -> Config:
    return (Row if record["kind"] == "row" else Stream)(**record["config"])


def in_short(config: Config | None) -> str:
    if config is None:
        return "cublas"
    pdl = f" pdl {'early' if config.early else 'late'}" if config.pdl else ""
    if isinstance(config, Row):
        return f"row {config.block_n}x{config.block_k} {config.warps}w{pdl}"
    share = f"{config.per_sm}/sm" if config.per_sm else f"split {config.split}"
    tma = " tma" if config.tma else ""
    pdl += f" +{config.prefetch}" if config.pdl else ""
    return f"{config.block_n}x{config.block_k} {config.stages}st {config.warps}w {share}{tma}{pdl}"


# The two parts


def sweep(bench: Bench, compilers: Compilers, jobs: list[Job], left: Callable[[], float]) -> list[dict[str, Any]]:
    records = [bench.library(shape, rows) for shape, rows in dict.fromkeys((job.shape, job.rows) for job in jobs)]
    for group, problem in compilers.by_variant(jobs, left):
        for job in group:
            records.append(describe(job) | {"failed": problem} if problem else bench.measure(job))
    done = sum("us" in record for record in records)
    print(f"{done} measured, {sum('failed' in record for record in records)} failed, of {len(jobs)}", flush=True)
    return records


def best(records: list[dict[str, Any]], shape: str, rows: int) -> list[dict[str, Any]]:
    found = [r for r in records if r["shape"] == shape and r["rows"] == rows and "us" in r and r["kind"] != "cublas"]
    return sorted(found, key=lambda record: record["us"])


def print_sweep(records: list[dict[str, Any]]) -> None:
    for library in [record for record in records if record["kind"] == "cublas"]:
        shape, rows = library["shape"], library["rows"]
        n, k = SHAPES[shape]
        floor = n * k * 2 / FLOOR_TBPS / 1e6
        print(f"{shape} {rows}: cublas {library['us']:.1f} us {library['tbps']:.2f} TB/s; floor {floor:.1f} us")
        for record in best(records, shape, rows)[:FEW]:
            gain = library["us"] / record["us"]
            print(
                f"   {record['us']:7.1f} us {record['tbps']:.2f} TB/s x{gain:.2f}  {in_short(config_of(record))}"
                f"  err {record['error']:.1e}"
            )


def candidates(records: list[dict[str, Any]], shape: str, rows: int) -> list[Config]:
    """The fastest, and the fastest of which a multiprocessor has room for one of this kernel and one of the next."""
    ranked = [config_of(record) for record in best(records, shape, rows)]
    small = [
        config
        for config in ranked
        if isinstance(config, Row) or max(config.per_sm, 1) * shared_bytes(config, rows) <= 112 << 10
    ]
    return list(dict.fromkeys(ranked[:4] + small[:3] + [one for one in ranked if isinstance(one, Row)][:2]))


def with_pdl(config: Config, early: bool, prefetch: int) -> Config:
    if isinstance(config, Row):
        return replace(config, pdl=True, early=early)
    return replace(config, pdl=True, early=early, prefetch=prefetch)


def compile_chains(
    compilers: Compilers, records: list[dict[str, Any]], rows_list: list[int], left: Callable[[], float]
) -> set[tuple[Any, ...]]:
    """The variants that the chains may use and that compiled in time: with programmatic dependent launch, and pd's."""
    jobs = table_jobs(rows_list) + [
        Job(shape, rows, with_pdl(config, early, 0))
        for rows, shape in product(rows_list, LAYER)
        for config in candidates(records, shape, rows)
        for early in (False, True)
    ]
    return {group[0].variant() for group, problem in compilers.by_variant(jobs, left) if not problem}


def tune_chain(
    bench: Bench, records: list[dict[str, Any]], ready: set[tuple[Any, ...]], rows: int, left: Callable[[], float]
) -> list[dict[str, Any]]:
    """Coordinate descent: one shape's configuration and launch at a time, in the chain. Every step is a record."""
    options = {shape: candidates(records, shape, rows) for shape in LAYER}
    found: list[dict[str, Any]] = []
    known: dict[tuple[Config | None, ...], float] = {}

    def tried(name: str, configs: dict[str, Config | None]) -> float:
        key = tuple(configs.values())
        if key not in known:
            try:
                known[key] = bench.chain(rows, configs)
            except Exception as error:  # as in `measure`
                print(name, type(error).__name__, str(error)[:200])
                known[key] = float("inf")
            shown = {shape: in_short(config) for shape, config in configs.items()}
            found.append({"chain": name, "rows": rows, "ms": known[key] * 1e3, "configs": shown})
        return known[key]

    tried("cublas", dict.fromkeys(LAYER))
    tried("table", {shape: config_for(rows, *SHAPES[shape]) for shape in LAYER})
    if not all(options.values()):
        return found
    plain: dict[str, Config | None] = {shape: options[shape][0] for shape in LAYER}
    tried("best alone", plain)
    current = {shape: with_pdl(options[shape][0], False, 1) for shape in LAYER}
    if any(Job(shape, rows, config).variant() not in ready for shape, config in current.items()):
        return found
    for _ in range(2):
        for shape in LAYER:
            best_time, best_config = tried("pdl", dict(current)), current[shape]
            here = current[shape]
            ways = [(here.early, prefetch) for prefetch in (0, 1, 2, 4)] + [(not here.early, p) for p in (0, 1, 2, 4)]
            choices = [with_pdl(config, here.early, getattr(here, "prefetch", 1)) for config in options[shape]]
            for config in choices + [None] * len(ways):
                if left() <= 0:
                    break
                trial = config or with_pdl(best_config, *ways.pop())
                if Job(shape, rows, trial).variant() not in ready:
                    continue
                taken = tried("pdl", current | {shape: trial})
                if taken < best_time:
                    best_time, best_config = taken, trial
            current[shape] = best_config
    for cut in product((False, True), repeat=len(LAYER)):
        if left() > 0:
            tried("mixed", {shape: None if off else current[shape] for shape, off in zip(LAYER, cut, strict=True)})
    tried("pdl off", {shape: replace(config, pdl=False, early=False) for shape, config in current.items()})
    return found


def print_chain(found: list[dict[str, Any]]) -> None:
    """cuBLAS, pd's, the best of each alone, the best chains, and the best without programmatic dependent launch."""
    floor = sum(n * k * 2 for n, k in LAYER.values()) * LAYERS
    for name, most in (("cublas", 1), ("table", 1), ("best alone", 1), ("pdl", 2), ("pdl off", 1), ("mixed", 2)):
        for record in sorted((one for one in found if one["chain"] == name), key=lambda one: one["ms"])[:most]:
            rate = floor / record["ms"] / 1e9
            print(f"chain {record['rows']:3d} {name:10s} {record['ms']:.3f} ms {rate:.2f} TB/s", end="")
            print(f"  {record['configs']}" if name in ("pdl", "mixed") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="in all, about")
    parser.add_argument("--rows", default="1,8,32,64,128,256")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="few configurations, also for the shapes of other models")
    options = parser.parse_args()
    begin = time.monotonic()
    compilers = Compilers(options.workers)
    rows_list = [int(one) for one in options.rows.split(",")]
    bench = Bench()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    records: list[dict[str, Any]] = []
    chains: list[dict[str, Any]] = []

    def left(share: float) -> float:
        return begin + share * options.seconds - time.monotonic()

    try:
        jobs = (quick_jobs if options.quick else all_jobs)(rows_list)
        records += sweep(bench, compilers, jobs, lambda: left(0.6))
        print_sweep(records)
        plan = [rows for rows in CHAIN_ROWS if rows in rows_list]
        ready = compile_chains(compilers, records, plan, lambda: left(0.75))
        for index, rows in enumerate(plan):
            share = 0.75 + 0.24 * (index + 1) / len(plan)
            found = tune_chain(bench, records, ready, rows, lambda share=share: left(share))  # type: ignore[misc]
            print_chain(found)
            chains += found
    finally:
        if options.out is not None:
            options.out.write_text(json.dumps({"alone": records, "chain": chains}))
        compilers.close()
    print(f"took {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
