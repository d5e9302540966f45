"""What this GPU can do at best: rates that a benchmark's figures are compared with. `python -m pd.runner.floors`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch

from pd.kernels.bandwidth import read_all

#: Rows of the GEMMs that say what a prompt's can reach, and their weights' shapes (out, in) in Llama-3.1-8B.
ROWS = 8192
GEMMS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ATTENTION = (2048, 8192)

BYTES = 4 << 30
REPEATS, ROUNDS = 5, 4


@dataclass(frozen=True)
class Floors:
    """`copy_gbps` counts read and written bytes. `gemm_tflops` over GEMMS together, on random data, by torch.

    `sdpa_tflops`: causal attention of so many tokens by torch's fastest, counting what is not masked.
    """

    device: str
    torch: str
    copy_gbps: float
    read_gbps: float
    gemm_tflops: float
    sdpa_tflops: Mapping[int, float]


def seconds(run: Callable[[], object]) -> float:
    """Of one call on the device; the best of REPEATS."""
    for _ in range(3):
        run()
    found = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(ROUNDS):
            run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / ROUNDS)
    return min(found)


def measure(device: torch.device) -> Floors:
    with torch.cuda.device(device), torch.inference_mode():
        source = torch.ones(BYTES // 4, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        copy = seconds(lambda: target.copy_(source))
        read = seconds(lambda: read_all(source))
        source = target = torch.empty(0)
        return Floors(
            device=torch.cuda.get_device_name(device),
            torch=torch.__version__,
            copy_gbps=2 * BYTES / copy / 1e9,
            read_gbps=BYTES / read / 1e9,
            gemm_tflops=_gemm_tflops(device),
            sdpa_tflops={tokens: _sdpa_tflops(device, tokens) for tokens in ATTENTION},
        )


def _gemm_tflops(device: torch.device) -> float:
    spent, flop = [], 0
    for out, inner in GEMMS:
        x = torch.randn(ROWS, inner, dtype=torch.bfloat16, device=device)
        weight = torch.randn(out, inner, dtype=torch.bfloat16, device=device)
        spent.append(seconds(partial(torch.nn.functional.linear, x, weight)))
        flop += 2 * ROWS * out * inner
    return flop / sum(spent) / 1e12


def _sdpa_tflops(device: torch.device, tokens: int) -> float:
    def made(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, dtype=torch.bfloat16, device=device)

    q, k, v = made(HEADS), made(KV_HEADS), made(KV_HEADS)
    flop = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
    best = 0.0
    for backend in (torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend):
            spent = seconds(
                lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
        best = max(best, flop / spent / 1e12)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(asdict(measure(torch.device("cuda", options.device)))))


if __name__ == "__main__":
    main()
