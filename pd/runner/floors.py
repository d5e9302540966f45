"""What this GPU can do at best: rates that a benchmark's figures are compared with. `python -m pd.runner.floors`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch

from pd.kernels.bandwidth import read_all
from pd.runner.timing import device_times

#: Rows of the GEMMs that say what a prompt's can reach, and their weights' shapes (out, in) in Llama-3.1-8B.
ROWS = 8192
GEMMS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ATTENTION = (2048, 8192)
LAYERS, PROMPTS = 32, (512, 2048, 8192)

#: Seconds that the prompts' limit is measured for.
STRETCH = 2.0

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
    prompt_ms: Mapping[int, float]  # GEMMs and attention of all LAYERS at so many tokens, nothing else


def seconds(run: Callable[[], object]) -> float:
    """Of one call on the device; the best of REPEATS."""
    return min(device_times(run, rounds=ROUNDS, repeats=REPEATS, warm_up=3))


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
            prompt_ms=_prompt_ms(device),
        )


def _gemm_tflops(device: torch.device) -> float:
    spent, flop = [], 0
    for out, inner in GEMMS:
        x = torch.randn(ROWS, inner, dtype=torch.bfloat16, device=device)
        weight = torch.randn(out, inner, dtype=torch.bfloat16, device=device)
        spent.append(seconds(partial(torch.nn.functional.linear, x, weight)))
        flop += 2 * ROWS * out * inner
    return flop / sum(spent) / 1e12


def _prompt_ms(device: torch.device) -> dict[int, float]:
    """As long at a stretch as serving takes: a GPU that is hot and short of power computes slower than in a burst."""
    weights = [[torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in GEMMS] for _ in range(LAYERS)]
    found = {}
    for tokens in PROMPTS:
        inputs = [torch.randn(tokens, inner, dtype=torch.bfloat16, device=device) for _, inner in GEMMS]
        q, k, v = _heads(device, tokens)

        def run(inputs: list[torch.Tensor] = inputs, heads: tuple[torch.Tensor, ...] = (q, k, v)) -> None:
            for layer in weights:
                for x, weight in zip(inputs, layer, strict=True):
                    torch.nn.functional.linear(x, weight)
                attend(*heads)

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            once = seconds(run)
            rounds = max(ROUNDS, int(STRETCH / once))
            (spent,) = device_times(run, rounds=rounds, repeats=1, warm_up=0)
        found[tokens] = 1e3 * spent
    return found


def _heads(device: torch.device, tokens: int) -> list[torch.Tensor]:
    return [
        torch.randn(1, heads, tokens, HEAD_DIM, dtype=torch.bfloat16, device=device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _sdpa_tflops(device: torch.device, tokens: int) -> float:
    q, k, v = _heads(device, tokens)
    flop = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
    best = 0.0
    for backend in (torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend):
            spent = seconds(partial(attend, q, k, v))
        best = max(best, flop / spent / 1e12)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(asdict(measure(torch.device("cuda", options.device)))))


if __name__ == "__main__":
    main()
