"""How fast a GPU attends to paged KV, beside what it can read and how fast cuDNN is in the same run.

    python tests/bench/bench_attention.py [--device cuda:0] [--only decode,configs,long,prefill,chunks] [--fp8]

The shape is Llama-3.1-8B's: 32 query heads, 8 kv heads of 128, bfloat16, blocks of 32 tokens at random in a pool of
8 GiB in the engine's layout; with --fp8 keys and values are of one byte, and the pool of 4 GiB. Decode runs in CUDA
graphs, over so many layers and tables that nothing is found in the cache: microseconds a launch, and the share of the
read bandwidth that its keys and values make.
  decode   rows of 1,024 tokens, by the most parts of a context; `table` is what the engine chooses, `kernel` the same
           with a kernel that combines the parts; then rows whose lengths differ
  configs  tokens a step / warps / stages, with the engine's split
  long     few rows of long contexts
  prefill  prompts without a prefix: cuDNN, FlashAttention-2, and the paged kernel by queries x heads / keys a step /
           warps / stages; and what the first call of a length costs cuDNN
  chunks   prompts behind a prefix of 8,192 tokens
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels.attention import DeviceBatch, Heads, LayerKv, PromptRow  # noqa: E402
from pd.kernels.attention_plan import Split, decode_split, prompt_tiles  # noqa: E402
from pd.kernels.attention_prefill_triton import PromptConfig, prompt_attention, prompt_config  # noqa: E402
from pd.kernels.attention_triton import DecodeConfig, decode_attention, processors  # noqa: E402
from pd.kernels.spans import as_words  # noqa: E402
from pd.kernels.spans_triton import prepare_pass  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402

QUERY_HEADS, KV_HEADS, DIM, PAGE, LAYERS = 32, 8, 128, 32, 8
BLOCKS = 8192  # of 1 MiB
SCALE = DIM**-0.5
REPEATS = 5
ROWS = (1, 8, 32, 64, 128, 256)
#: Bytes that a graph reads at least: many times the cache.
GRAPH_BYTES = 1 << 30

DECODE_CONFIGS = [
    DecodeConfig(*one) for one in ((64, 4, 3), (64, 4, 5), (32, 4, 3), (32, 4, 5), (32, 2, 5), (128, 4, 3), (128, 8, 3))
]
PROMPT_CONFIGS = [PromptConfig(*one) for one in ((128, 64, 8, 5), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3))]

Run = Callable[[], object]


def graph_seconds(runs: Sequence[Run]) -> float:
    """Per run when all of them are one graph, the median of REPEATS."""
    runs[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    return device_seconds(graph.replay, 1) / len(runs)


def device_seconds(run: Run, rounds: int = 5) -> float:
    """Per run on the device, the median of REPEATS."""
    return float(np.median(device_times(run, rounds=rounds, repeats=REPEATS, warm_up=1)))


def name(config: DecodeConfig | PromptConfig) -> str:
    return "/".join(str(value) for value in vars(config).values())


class Bench:
    def __init__(self, device: str, fp8: bool) -> None:
        self.device = device
        self.rng = np.random.default_rng(0)
        self.pool = torch.empty(BLOCKS, KV_HEADS, LAYERS, 2, PAGE, DIM, dtype=torch.bfloat16, device=device).normal_()
        if fp8:
            self.pool = self.pool.to(torch.float8_e4m3fn)
        self.token_bytes = 2 * KV_HEADS * DIM * self.pool.itemsize  # of a layer
        self.processors = processors(self.pool.device)
        words = as_words(self.pool)
        table = np.zeros((BLOCKS, 4), dtype=np.int64)
        table[:, 2] = len(words) // BLOCKS
        table[:, 0] = self.rng.permutation(BLOCKS) * table[:, 2]
        digests = torch.zeros(BLOCKS, dtype=torch.int64, device=device)
        digest = device_seconds(prepare_pass(words, None, table, digests), 2)
        largest = device_seconds(lambda: torch.amax(words.view(torch.float32)), 2)
        self.read = self.pool.nbytes / min(digest, largest)
        print(f"reads {self.read / 1e12:.2f} TB/s (digest {digest * 1e3:.2f} ms, torch.amax {largest * 1e3:.2f} ms)")

    def kv(self, layer: int) -> LayerKv:
        return LayerKv(self.pool[:, :, layer, 0], self.pool[:, :, layer, 1])

    def heads(self, tokens: int) -> Heads:
        fused = torch.randn(tokens, QUERY_HEADS + 2 * KV_HEADS, DIM, device=self.device).bfloat16()
        return Heads(*fused.split([QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1))

    def batch(self, lengths: Sequence[int], prompts: tuple[PromptRow, ...] = ()) -> DeviceBatch:
        """Rows whose blocks are drawn anew; the last ones are `prompts`."""
        width = -(-max(lengths) // PAGE)
        ids = self.rng.permutation(BLOCKS)[: width * len(lengths)]
        if len(ids) < width * len(lengths):
            ids = self.rng.integers(0, BLOCKS, width * len(lengths))
        starts = [prompt.start for prompt in prompts] + [sum(prompt.count for prompt in prompts)]
        unused = torch.empty(0, dtype=torch.int32)

        def place(values: object) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(self.device)

        return DeviceBatch(
            positions=unused,
            blocks=unused,
            offsets=unused,
            tables=place(ids).view(len(lengths), width),
            lengths=place(lengths),
            decode=len(lengths) - len(prompts),
            prompts=prompts,
            starts=place(starts),
            tiles=place(prompt_tiles(prompts, QUERY_HEADS // KV_HEADS)),
            arrivals=place(np.zeros(len(lengths) * KV_HEADS)),
        )

    def decode(
        self,
        lengths: Sequence[int],
        split: Split | None = None,
        config: DecodeConfig | None = None,
        arrivals: bool = True,
    ) -> str:
        """One cell: microseconds a launch and the share of the read bandwidth."""
        nbytes = sum(lengths) * self.token_bytes
        launches = max(LAYERS, -(-GRAPH_BYTES // nbytes))
        batches = [self.batch(lengths) for _ in range(-(-launches // LAYERS))]
        if not arrivals:
            batches = [replace(batch, arrivals=None) for batch in batches]
        q = self.heads(len(lengths)).q
        out = torch.empty(len(lengths), QUERY_HEADS * DIM, dtype=q.dtype, device=self.device)
        runs = []
        for i in range(launches):
            kv, batch = self.kv(i % LAYERS), batches[i // LAYERS]
            runs.append(partial(decode_attention, q, kv, batch, out, SCALE, 0, split, config))
        seconds = graph_seconds(runs)
        return f"{seconds * 1e6:7.1f} {nbytes / seconds / self.read:4.2f}"

    def mixed(self, rows: int) -> list[int]:
        """Lengths from 1/8 to 4 times 1,024, equally many in each octave, about 1,024 on average."""
        lengths = 128 * 2 ** self.rng.uniform(0, 5, rows)
        return [int(length) for length in lengths]


def decode_table(bench: Bench) -> None:
    parts = (1, 2, 3, 4, 6, 8, 12, 16)
    print("\ndecode, 1,024 tokens: us a launch, share of read bandwidth")
    print("rows |       table |      kernel | " + " | ".join(f"{most:8d} pts" for most in parts))
    for rows in ROWS:
        lengths = [1024] * rows
        cells = [bench.decode(lengths), bench.decode(lengths, arrivals=False)]
        cells += [bench.decode(lengths, Split(most, 64)) for most in parts]
        print(f"{rows:4d} | {' | '.join(cells)}  (table: {decode_split(rows, KV_HEADS, bench.processors)})", flush=True)
    print("lengths from 128 to 4,096")
    for rows in (8, 64, 256):
        lengths = bench.mixed(rows)
        cells = [bench.decode(lengths), bench.decode(lengths, arrivals=False)]
        cells += [bench.decode(lengths, Split(most, 64)) for most in parts]
        print(f"{rows:4d} | {' | '.join(cells)}", flush=True)


def decode_configs(bench: Bench) -> None:
    print("\ndecode by configuration, 1,024 tokens, the engine's split")
    print("rows | " + " | ".join(f"{name(config):>12}" for config in DECODE_CONFIGS))
    for rows in ROWS:
        cells = [bench.decode([1024] * rows, config=config) for config in DECODE_CONFIGS]
        print(f"{rows:4d} | {' | '.join(cells)}", flush=True)


def decode_long(bench: Bench) -> None:
    print("\ndecode, long contexts, the engine's split by configuration")
    print("rows x tokens | " + " | ".join(f"{name(config):>12}" for config in DECODE_CONFIGS[:3]))
    for rows, tokens in ((1, 8192), (1, 131_072), (8, 16_384), (64, 4096)):
        cells = [bench.decode([tokens] * rows, config=config) for config in DECODE_CONFIGS[:3]]
        print(f"{rows:4d} x {tokens:6d} | {' | '.join(cells)}", flush=True)
    lengths = [1024] * 63 + [32_768]
    print(f"63 x 1024 and one of 32768 | {bench.decode(lengths)}")


def tflops(count: int, context: int, seconds: float) -> str:
    pairs = count * (context - count) + count * (count + 1) // 2
    return f"{seconds * 1e6:7.0f} {4 * DIM * QUERY_HEADS * pairs / seconds / 1e12:4.0f}"


def paged_cells(bench: Bench, count: int, context: int, split: Split | None = None) -> list[str]:
    heads, batch = bench.heads(count), bench.batch([context], (PromptRow(0, count, context),))
    out = torch.empty(count, QUERY_HEADS * DIM, dtype=torch.bfloat16, device=bench.device)
    cells = []
    assert batch.tiles is not None
    for config in PROMPT_CONFIGS:
        run = partial(prompt_attention, heads.q, bench.kv(0), batch, out, SCALE, 0, batch.tiles, config, split)
        cells.append(tflops(count, context, device_seconds(run)))
    return cells


def sdpa(heads: Heads, backend: SDPBackend) -> Run:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in heads)

    def run() -> None:
        with sdpa_kernel(backend):
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def prefill(bench: Bench) -> None:
    columns = ["cuDNN", "flash", *(name(config) for config in PROMPT_CONFIGS)]
    print(f"\nprompts without a prefix: us a layer, TFLOP/s (the engine's: {name(prompt_config(torch.bfloat16, DIM))})")
    print("tokens | " + " | ".join(f"{column:>12}" for column in columns) + " | cuDNN's first call, ms")
    for count in (512, 1024, 1777, 2048, 4096, 8192):
        heads = bench.heads(count)
        torch.cuda.synchronize()
        start = time.perf_counter()
        sdpa(heads, SDPBackend.CUDNN_ATTENTION)()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
        cells = [tflops(count, count, device_seconds(sdpa(heads, backend))) for backend in backends]
        cells += paged_cells(bench, count, count)
        print(f"{count:6d} | {' | '.join(cells)} | {first * 1e3:5.0f}", flush=True)


def chunks(bench: Bench) -> None:
    print("\nprompts behind a prefix of 8,192 tokens: us a layer, TFLOP/s; then with keys that are not divided")
    print("tokens | " + " | ".join(f"{name(config):>12}" for config in PROMPT_CONFIGS * 2))
    for count in (32, 128, 512, 2048, 8192):
        cells = paged_cells(bench, count, count + 8192) + paged_cells(bench, count, count + 8192, Split(1, 1))
        print(f"{count:6d} | {' | '.join(cells)}", flush=True)


PARTS = {"decode": decode_table, "configs": decode_configs, "long": decode_long, "prefill": prefill, "chunks": chunks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--fp8", action="store_true", help="keys and values in float8_e4m3fn")
    options = parser.parse_args()
    start = time.perf_counter()
    with torch.cuda.device(options.device), torch.inference_mode():
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        bench = Bench(options.device, options.fp8)
        for part in options.only.split(","):
            PARTS[part](bench)
            print(f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
