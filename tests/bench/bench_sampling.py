"""How long sampling takes on a GPU, in a captured graph as a decode step runs it.

    python tests/bench/bench_sampling.py [--device cuda:0] [--rows 1,8,64,256] [--vocab 128256] [--dtype bfloat16]

Microseconds a call, the median of five replays of a graph of ten. `read` is what reading the logits once takes at the
rate of `torch.sum` over 2 GiB; `argmax` is torch's. Logits are `flat` (a normal distribution: 0.9 of the mass needs
half of the vocabulary) or `peaked` (fifty tokens stand out, as a language model's do). The last table is the first pass
of warm rows alone, by tokens a tile and warps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels.cuts_triton import find_cuts  # noqa: E402
from pd.kernels.sampling_device import sample_rows  # noqa: E402
from pd.kernels.sampling_triton import pick_pass  # noqa: E402
from pd.kernels.shaping import Penalties, apply_penalties, forbid_rows  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402
from tests.sampling_kit import device_sampling  # noqa: E402

ROUNDS, REPEATS = 10, 5
CASES: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    # restricted, logprobs, parameters
    "greedy": (False, False, {"temperature": 0.0}),
    "warm": (False, False, {}),
    "half warm": (False, False, {"temperature": [0.0, 1.0]}),
    "warm, logprobs": (False, True, {}),
    "no limits": (True, False, {}),
    "top-k 50": (True, False, {"top_k": 50}),
    "top-p 0.9": (True, False, {"top_p": 0.9}),
    "min-p 0.05": (True, False, {"min_p": 0.05}),
    "all three": (True, False, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}),
    "half top-p": (True, False, {"top_p": [1.0, 0.9]}),
}
TILES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))


def microseconds(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS):
            run()
    return 1e6 / ROUNDS * float(np.median(device_times(graph.replay, rounds=1, repeats=REPEATS, warm_up=1)))


def make_logits(rows: int, options: argparse.Namespace, peaked: bool) -> torch.Tensor:
    generator = torch.Generator(options.device).manual_seed(rows)
    logits = torch.randn(rows, options.vocab, generator=generator, device=options.device)
    if peaked:
        best = torch.randint(options.vocab, (rows, 50), generator=generator, device=options.device)
        logits.mul_(2).scatter_add_(1, best, 10 + 3 * torch.randn(rows, 50, generator=generator, device=options.device))
    return logits.to(getattr(torch, options.dtype))


def shaping_line(rows: int, options: argparse.Namespace) -> str:
    logits = make_logits(rows, options, False).float()
    slots = torch.arange(rows, dtype=torch.int32, device=options.device)
    words = -(-options.vocab // 32)
    seen = torch.randint(-(2**31), 2**31, (rows, words), device=options.device).int()
    counts = torch.randint(0, 2, (rows, options.vocab), device=options.device).short()
    ones = torch.ones(rows, device=options.device)

    def penalise(slot: torch.Tensor) -> float:
        penalties = Penalties(slot, ones * 1.0001, ones * 0.001, ones * 0.001)
        return microseconds(lambda: apply_penalties(logits, penalties, seen, counts))

    mask = microseconds(lambda: forbid_rows(logits, slots, seen))
    return f"{rows:4d} {penalise(slots):11.1f} {penalise(torch.full_like(slots, -1)):11.1f} {mask:11.1f}"


def pick_microseconds(logits: torch.Tensor, tile: int, warps: int) -> float:
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, tile)
    sampling = device_sampling(rows, device=str(logits.device))
    keys = sampling.temperature, sampling.seed, sampling.choice, sampling.position
    picks = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)
    absent = {"raw": None, "cuts": None, "last_ties": None, "highs": None, "sums": None, "raw_stride": 0}
    names = dict(zip(("temperatures", "seeds", "choices", "positions"), keys, strict=True)) | absent
    fixed = {"picks": picks, "stride": logits.stride(0), "vocab": vocab, "TILE": tile}
    return microseconds(
        lambda: pick_pass[(tiles, rows)](logits=logits, **names, **fixed, num_warps=warps, enable_fp_fusion=True)
    )


def case_microseconds(logits: torch.Tensor, restricted: bool, logprobs: bool, parameters: dict[str, Any]) -> float:
    sampling = device_sampling(len(logits), device=str(logits.device), **parameters)
    return microseconds(lambda: sample_rows(logits, sampling, restricted=restricted, logprobs=logprobs))


def cut_microseconds(logits: torch.Tensor, **parameters: Any) -> float:
    sampling = device_sampling(len(logits), device=str(logits.device), **parameters)
    return microseconds(lambda: find_cuts(logits, sampling))


def argmax_microseconds(logits: torch.Tensor) -> float:
    return microseconds(lambda: logits.argmax(-1))


def read_rate(device: str) -> float:
    """Bytes a second."""
    much = torch.ones(1 << 29, device=device)
    return much.numel() * 4 / microseconds(lambda: much.sum()) * 1e6


def print_line(name: str, found: Iterable[float]) -> None:
    print(f"{name:15s}" + "".join(f"{one:9.1f}" for one in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    sizes = [int(one) for one in options.rows.split(",")]
    with torch.cuda.device(options.device):
        print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, options.dtype)
        rate = read_rate(options.device)
        print(f"reads at {rate / 1e12:.2f} TB/s")
        for peaked in (False, True):
            print(f"{'peaked' if peaked else 'flat':15s}" + "".join(f"{rows:9d}" for rows in sizes))
            batches = [make_logits(rows, options, peaked) for rows in sizes]
            print_line("read", (one.numel() * one.element_size() / rate * 1e6 for one in batches))
            print_line("argmax", map(argmax_microseconds, batches))
            for name, case in CASES.items():
                print_line(name, (case_microseconds(one, *case) for one in batches))
            print_line("top-k 50 cuts", (cut_microseconds(one, top_k=50) for one in batches))
            print_line("top-p 0.9 cuts", (cut_microseconds(one, top_p=0.9) for one in batches))
        print("rows   penalties   none asks       masks")
        for rows in sizes:
            print(shaping_line(rows, options), flush=True)
        print(f"{'tile, warps':15s}" + "".join(f"{rows:9d}" for rows in sizes))
        for tile, warps in TILES:
            print_line(f"{tile:8d} {warps:6d}", (pick_microseconds(one, tile, warps) for one in batches))


if __name__ == "__main__":
    main()
