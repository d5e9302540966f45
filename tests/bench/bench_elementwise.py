"""What norms, the gated activation and rotation take on a GPU, beside the time in which their bytes can be copied.

    python tests/bench/bench_elementwise.py [--device cuda:0] [--rows 1,8,64,256,8192] [--head-dim 128] [--qk-norm]

Shapes are Llama-3.1-8B's, in bfloat16: hidden 4,096, 32 query and 8 kv heads, intermediate 14,336. Each op is captured
in a CUDA graph many times in a row; `us` is what one takes in a replay, launched as a dependent (`PDL`: it starts while
the one before it ends) and without, and by torch (the reference). `floor` is the time of its bytes, each read and
written once, at the rate of a plain copy of 1 GiB in the same run; `ratio` is by that. A few rows cost latency, not
bytes (and are in the cache, as they are in a model's step): compare with `empty`, a kernel that only waits for the one
before it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels import reference  # noqa: E402
from pd.kernels.activation_triton import run_silu_mul  # noqa: E402
from pd.kernels.attention import AttentionBatch, LayerKv  # noqa: E402
from pd.kernels.launch import launch_options, pdl_supported  # noqa: E402
from pd.kernels.norm_triton import run_norm  # noqa: E402
from pd.kernels.rope import QkNorm  # noqa: E402
from pd.kernels.rope_triton import run_rope_tables, run_rope_write  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402

HIDDEN, INTERMEDIATE, Q_HEADS, KV_HEADS = 4096, 14336, 32, 8
BLOCK_TOKENS, LAYERS = 32, 32
REPEATS = 7


@triton.jit
def empty_kernel(out, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def graph_seconds(run: Callable[[], object], copies: int) -> float:
    """Per run, the median of REPEATS replays of a graph of `copies` runs."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            run()
    return float(np.median(device_times(graph.replay, rounds=1, repeats=REPEATS, warm_up=2))) / copies


def copy_rate(nbytes: int) -> float:
    """Bytes read and written per second by a plain copy."""
    source = torch.randint(-(2**63), 2**63 - 1, (nbytes // 8,), device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / graph_seconds(lambda: target.copy_(source), 10)


class Ops:
    """Each op over `rows` rows: bytes that it moves, and how it is run with PDL or without, and by torch."""

    def __init__(self, rows: int, head_dim: int, qk_norm: bool) -> None:
        def bf16(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda").to(torch.bfloat16)

        heads = Q_HEADS + 2 * KV_HEADS
        x, residual, gate_up = bf16(rows, HIDDEN), bf16(rows, HIDDEN), bf16(rows, 2 * INTERMEDIATE)
        weight = bf16(HIDDEN)
        qkv = bf16(rows, heads * head_dim)
        blocks = max(64, rows // BLOCK_TOKENS)
        shape = (blocks, KV_HEADS, LAYERS, 2, BLOCK_TOKENS, head_dim)
        pool = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        kv = LayerKv(pool[:, :, 1, 0], pool[:, :, 1, 1])
        place = torch.randperm(blocks * BLOCK_TOKENS, device="cuda")[:rows]
        positions = torch.randint(0, 8192, (rows,), device="cuda", dtype=torch.int32)
        batch = AttentionBatch(positions, (place // BLOCK_TOKENS).int(), (place % BLOCK_TOKENS).int(), (), ())
        wide = AttentionBatch(positions, place // BLOCK_TOKENS, place % BLOCK_TOKENS, (), ())
        norm = QkNorm(bf16(head_dim), bf16(head_dim), 1e-6) if qk_norm else None
        frequencies = 500_000.0 ** -(torch.arange(head_dim // 2, device="cuda") / (head_dim // 2))
        tables = reference.rope_tables(positions, frequencies, 1.0)
        turned, written = (Q_HEADS + KV_HEADS) * head_dim, 2 * KV_HEADS * head_dim
        self.all: dict[str, tuple[int, Callable[[bool], object], Callable[[], object]]] = {
            "rms_norm": (
                2 * (2 * rows + 1) * HIDDEN,
                lambda pdl: run_norm(x, None, weight, 1e-6, pdl),
                lambda: reference.rms_norm(x, weight, 1e-6),
            ),
            "add_rms_norm": (
                2 * (4 * rows + 1) * HIDDEN,
                lambda pdl: run_norm(x, residual, weight, 1e-6, pdl),
                lambda: reference.add_rms_norm(x, residual, weight, 1e-6),
            ),
            "silu_mul": (
                2 * 3 * rows * INTERMEDIATE,
                lambda pdl: run_silu_mul(gate_up, pdl),
                lambda: reference.silu_mul(gate_up),
            ),
            "rope_write_kv": (
                2 * rows * (heads * head_dim + turned + written) + 4 * rows * head_dim,
                lambda pdl: run_rope_write(qkv, *tables, kv, batch, norm, pdl),
                lambda: reference.rope_write_kv(qkv, *tables, kv, wide, norm),
            ),
            "rope_tables": (
                4 * rows * (head_dim + 1),
                lambda pdl: run_rope_tables(positions, frequencies, 1.0, pdl),
                lambda: reference.rope_tables(positions, frequencies, 1.0),
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", default="1,8,64,256,8192")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--qk-norm", action="store_true")
    options = parser.parse_args()
    with torch.cuda.device(options.device):
        print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
        pdls = [False, True] if pdl_supported(torch.device(options.device)) else [False]
        rate = copy_rate(1 << 30)
        word = torch.zeros(1, device="cuda")
        print(f"plain copy of 1 GiB: {rate / 1e9:.0f} GB/s; us in a graph:")
        for pdl in pdls:
            empty = graph_seconds(partial(empty_kernel[(1,)], word, **launch_options(4, pdl=pdl)), 200)
            print(f"empty{', PDL' if pdl else ''}: {empty * 1e6:.2f}")
        kinds = "".join(f" {'PDL' if pdl else 'plain':>7} ratio |" for pdl in pdls)
        print(f"{'op':14s}  rows |   floor |{kinds}   torch")
        for rows in (int(one) for one in options.rows.split(",")):
            copies = 200 if rows <= 256 else 20
            for name, (moved, run, torchs) in Ops(rows, options.head_dim, options.qk_norm).all.items():
                floor = moved / rate
                line = f"{name:14s} {rows:5d} | {floor * 1e6:7.2f} |"
                for pdl in pdls:
                    took = graph_seconds(partial(run, pdl), copies)
                    line += f" {took * 1e6:7.2f} {floor / took:5.2f} |"
                print(f"{line} {graph_seconds(torchs, max(copies // 10, 5)) * 1e6:7.2f}", flush=True)


if __name__ == "__main__":
    main()
