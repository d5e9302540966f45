"""The command: floors first, then the engine, then a table of both."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from pd.bench.engine import cases, http
from pd.bench.engine.client import EngineClient
from pd.bench.engine.shapes import SHAPES, make_model
from pd.bench.engine.traces import Shares
from pd.config import CacheConfig, LogConfig, ModelConfig, SchedulerConfig, ServeConfig
from pd.errors import ConfigError, PdError
from pd.logs import configure
from pd.models.checkpoint import read_json
from pd.models.dense import DenseConfig, dense_config
from pd.models.kv_cache import FP8_E4M3

#: What is profiled: steady decode steps of a batch, and single prompts; and how many kernels of it are shown.
PROFILED_BATCH, PROFILED_STEPS, SHOWN_KERNELS = 64, 200, 16

#: Seconds that measuring the GPU's own rates may take.
FLOORS_TIMEOUT = 300.0

WHAT = ("decode", "prefill", "ttft", "throughput", "profile", "http")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model directory (default: the shape with random weights)")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES), help="default: llama-3.1-8b")
    parser.add_argument("--only", default=",".join(WHAT), help=f"what to measure, of {','.join(WHAT)} (default: all)")
    parser.add_argument("--batches", default="1,8,32,64,128,256", help="decode batches")
    parser.add_argument("--prompts", default="512,2048,8192", help="prompt lengths")
    parser.add_argument("--base-gpu-id", type=int, default=0)
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--attention-backend", default="auto", choices=("auto", "triton", "torch"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8_e4m3", "fp8"))
    parser.add_argument("--max-prefill-tokens", type=int, default=0, help="prompt tokens per step")
    parser.add_argument("--log-level", default="warning", help="of the engine's processes (default: warning)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to F")


@dataclass
class Figures:
    """What the command writes. Times in ms, by batch or prompt length as text; rates in tokens per second."""

    device: str
    date: str
    command: str
    floors: dict[str, Any]
    start_s: float = 0.0
    floor_ms: dict[str, float] = field(default_factory=dict)
    decode_ms: dict[str, float] = field(default_factory=dict)
    prefill_limit_tok_s: dict[str, float] = field(default_factory=dict)
    prefill_tok_s: dict[str, float] = field(default_factory=dict)
    ttft_ms: dict[str, float] = field(default_factory=dict)
    throughput_out_tok_s: float | None = None
    http_out_tok_s: float | None = None
    idle_share: float | None = None
    #: By what was profiled: [kernel, ms a step, launches a step].
    kernels: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)


def run(namespace: argparse.Namespace) -> int:
    only = namespace.only.split(",")
    if unknown := set(only) - set(WHAT):
        raise ConfigError("--only", f"{', '.join(sorted(unknown))}: not one of {', '.join(WHAT)}")
    configure("bench", "", LogConfig(log_level=namespace.log_level))
    with tempfile.TemporaryDirectory() as folder:
        model = namespace.model or str(make_model(Path(folder), namespace.shape))
        floors = measure_floors(namespace.base_gpu_id)
        figures = Figures(floors["device"], time.strftime("%Y-%m-%d"), "pd " + " ".join(sys.argv[1:]), floors)
        config = ServeConfig(
            role="unified",
            model=ModelConfig(
                model=model,
                load_format="auto" if namespace.model else "dummy",
                base_gpu_id=namespace.base_gpu_id,
                disable_cuda_graph=namespace.disable_cuda_graph,
                attention_backend=namespace.attention_backend,
                device="cuda",
            ),
            cache=CacheConfig(
                disable_prefix_cache=True,
                kv_cache_dtype="auto" if namespace.kv_cache_dtype == "auto" else FP8_E4M3,
            ),
            scheduler=SchedulerConfig(
                max_prefill_tokens=namespace.max_prefill_tokens, chunked_prefill_size=namespace.max_prefill_tokens
            ),
            log=LogConfig(log_level=namespace.log_level, log_format="json"),
        )
        shape = dense_config(model, read_json(model, "config.json"))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_measure(config, shape, namespace, only, figures))
        if "http" in only:
            figures.http_out_tok_s = http.throughput(model, http_options(config), Path(folder))
            say(f"through HTTP: {figures.http_out_tok_s:.0f} out tok/s")
    if namespace.json:
        namespace.json.write_text(json.dumps(vars(figures), indent=1))
    console = Console(width=120)
    console.print(table(figures))
    for what, kernels in figures.kernels.items():
        found = Table(title=f"{what}: device time of a step")
        for column in ("kernel", "ms", "launches"):
            found.add_column(column, justify="left" if column == "kernel" else "right")
        for name, ms, count in kernels:
            found.add_row(name, f"{ms:.3f}", f"{count:.1f}")
        console.print(found)
    return 0


def http_options(config: ServeConfig) -> list[str]:
    """Flags of `pd up` that make its instance the one that was measured."""
    model = config.model
    flags = ["--load-format", model.load_format, "--device", "cuda", "--base-gpu-id", str(model.base_gpu_id)]
    flags += ["--attention-backend", model.attention_backend, "--disable-prefix-cache", "--log-level", "warning"]
    flags += ["--kv-cache-dtype", config.cache.kv_cache_dtype]
    flags += ["--disable-cuda-graph"] * model.disable_cuda_graph
    limit = config.scheduler.max_prefill_tokens
    return flags + (["--max-prefill-tokens", str(limit), "--chunked-prefill-size", str(limit)] if limit else [])


def measure_floors(gpu: int) -> dict[str, Any]:
    """In a process of its own, which gives the GPU's memory back."""
    command = [sys.executable, "-m", "pd.runner.floors", "--device", str(gpu)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FLOORS_TIMEOUT)
    if done.returncode:
        raise PdError(f"the GPU's rates cannot be measured: {done.stderr.strip().splitlines()[-1]}")
    floors: dict[str, Any] = json.loads(done.stdout)
    return floors


async def _measure(
    config: ServeConfig, shape: DenseConfig, options: argparse.Namespace, only: list[str], figures: Figures
) -> None:
    batches = [int(one) for one in options.batches.split(",")]
    prompts = [int(one) for one in options.prompts.split(",")]
    floors = figures.floors
    async with EngineClient(config) as engine:
        figures.start_s = engine.start_seconds
        say(f"started in {engine.start_seconds:.1f} s")
        await engine.ask([64] * 4, 8)
        if "decode" in only:
            for batch in batches:
                ms = await cases.decode_ms(engine, batch, engine.step_tokens)
                figures.decode_ms[str(batch)] = ms
                needed = step_bytes(shape, batch, kv_bytes=1 if config.cache.kv_cache_dtype == FP8_E4M3 else 2)
                figures.floor_ms[str(batch)] = 1e3 * needed / (floors["copy_gbps"] * 1e9)
                say(f"decode {batch}: {ms:.2f} ms")
        if "prefill" in only:
            for tokens in prompts:
                rate = await cases.prefill_tok_s(engine, tokens)
                figures.prefill_tok_s[str(tokens)] = rate
                figures.prefill_limit_tok_s[str(tokens)] = prefill_limit(shape, tokens, floors)
                say(f"prefill {tokens}: {rate:.0f} tok/s")
        if "ttft" in only:
            for tokens in prompts:
                figures.ttft_ms[str(tokens)] = await cases.ttft_ms(engine, tokens)
                say(f"ttft {tokens}: {figures.ttft_ms[str(tokens)]:.1f} ms")
        if "throughput" in only:
            figures.throughput_out_tok_s = (await cases.throughput(engine)).out_tok_s
            say(f"throughput: {figures.throughput_out_tok_s:.0f} out tok/s")
        if "profile" in only:
            await _profile(engine, prompts, figures)


async def _profile(engine: EngineClient, prompts: list[int], figures: Figures) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shares = await cases.decode_shares(engine, PROFILED_BATCH, PROFILED_STEPS, Path(folder), engine.step_tokens)
        figures.idle_share = shares.idle
        figures.kernels[f"decode {PROFILED_BATCH}"] = _each(shares, PROFILED_STEPS)
        say(f"idle in {PROFILED_STEPS} steps of {PROFILED_BATCH}: {shares.idle:.1%}")
        for tokens in prompts:
            shares = await cases.prefill_shares(engine, tokens, Path(folder))
            figures.kernels[f"prefill {tokens}"] = _each(shares, cases.REPEATS)
            say(f"idle in prompts of {tokens}: {shares.idle:.1%}")


def _each(shares: Shares, steps: int) -> list[tuple[str, float, float]]:
    return [(name, 1e3 * seconds / steps, count / steps) for name, seconds, count in shares.kernels[:SHOWN_KERNELS]]


def step_bytes(shape: DenseConfig, batch: int, kv_bytes: int = 2) -> float:
    """What a decode step must read and write: every weight once, and the context's KV; in bytes, 2 a weight."""
    return (
        2 * layer_weights(shape)
        + 2 * shape.vocab_size * shape.hidden_size
        + batch * cases.CONTEXT * (2 * kv_bytes * shape.num_layers * shape.num_kv_heads * shape.head_dim)
    )


def layer_weights(shape: DenseConfig) -> int:
    """Numbers in all layers' projections."""
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return shape.num_layers * shape.hidden_size * (heads + 3 * shape.intermediate_size)


def prefill_limit(shape: DenseConfig, tokens: int, floors: dict[str, Any]) -> float:
    """Tokens per second of torch's GEMMs and attention alone: measured for Llama-3.1-8B, elsewhere by rates."""
    measured = floors["prompt_ms"].get(str(tokens))
    if measured and shape.num_layers == 32 and shape.hidden_size == 4096 and shape.intermediate_size == 14336:
        return float(1e3 * tokens / measured)
    attention = 4 * shape.num_heads * shape.head_dim * (tokens + 1) / 2 * shape.num_layers
    rates = {int(length): rate for length, rate in floors["sdpa_tflops"].items()}
    nearest = min(rates, key=lambda length: abs(length - tokens))
    return float(1e12 / (2 * layer_weights(shape) / floors["gemm_tflops"] + attention / rates[nearest]))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(figures: Figures) -> Table:
    floors = figures.floors
    title = (
        f"{figures.device}, torch {floors['torch']}: copy {floors['copy_gbps']:.0f} GB/s, "
        f"read {floors['read_gbps']:.0f}, GEMM {floors['gemm_tflops']:.0f} TFLOP/s, attention "
        + ", ".join(f"{rate:.0f} at {tokens}" for tokens, rate in floors["sdpa_tflops"].items())
    )
    found = Table(title=title)
    for column in ("what", "measured", "limit", "ratio"):
        found.add_column(column, justify="left" if column == "what" else "right")
    for batch, ms in figures.decode_ms.items():
        floor = figures.floor_ms[batch]
        found.add_row(f"decode step, batch {batch}, ms", f"{ms:.2f}", f"{floor:.2f}", f"{ms / floor:.2f}")
    for tokens, rate in figures.prefill_tok_s.items():
        limit = figures.prefill_limit_tok_s[tokens]
        found.add_row(f"prefill {tokens}, tok/s", f"{rate:.0f}", f"{limit:.0f}", f"{rate / limit:.2f}")
    for tokens, ms in figures.ttft_ms.items():
        bound = figures.prefill_limit_tok_s.get(tokens)
        least = 1e3 * int(tokens) / bound if bound else None
        found.add_row(
            f"first token of {tokens}, ms",
            f"{ms:.1f}",
            f"{least:.1f}" if least else "",
            f"{ms / least:.2f}" if least else "",
        )
    if figures.throughput_out_tok_s:
        what = f"{cases.REQUESTS} x ({cases.INPUT} in, {cases.OUTPUT} out), out tok/s"
        found.add_row(what, f"{figures.throughput_out_tok_s:.0f}", "", "")
    if figures.http_out_tok_s and figures.throughput_out_tok_s:
        share = figures.http_out_tok_s / figures.throughput_out_tok_s
        found_rate, engine = f"{figures.http_out_tok_s:.0f}", f"{figures.throughput_out_tok_s:.0f}"
        found.add_row("the same through router and HTTP", found_rate, engine, f"{share:.2f}")
    if figures.idle_share is not None:
        found.add_row(f"GPU idle in {PROFILED_STEPS} steps of {PROFILED_BATCH}", f"{figures.idle_share:.1%}", "", "")
    found.add_row("start-up, s", f"{figures.start_s:.1f}", "", "")
    return found
