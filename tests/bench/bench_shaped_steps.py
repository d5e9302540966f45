"""What a decode step of one GPU takes when its rows ask for more than a draw from all tokens.

    python tests/bench/bench_shaped_steps.py [--device cuda:0] [--rows 1,64,256] [--context 1024] [--steps 100]

Llama-3.1-8B's shape, bf16, random weights, in CUDA graphs; each step is launched before the results of the one before
it are taken, as the scheduler does. Milliseconds a step, the median; then what it is more than a plain step. `one` of
the rows asks, or all do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.api import grammar  # noqa: E402
from pd.bench.engine.shapes import make_model  # noqa: E402
from pd.messages import Admit, StepOrder  # noqa: E402
from pd.models.info import check_model  # noqa: E402
from pd.runner.grammar import Grammars  # noqa: E402
from pd.runner.kv_pool import KvPool, allocate_region  # noqa: E402
from pd.runner.loading import TORCH_DTYPES, load_model  # noqa: E402
from pd.types import BlockShape, SamplingParams  # noqa: E402
from tests.worker_driver import BUILDERS, i32, i64, make_worker  # noqa: E402

PAGE, WARM_STEPS = 32, 10
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p, logprob": {"top_p": 0.9, "logprobs": True},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "bias of 300": {"logit_bias": dict.fromkeys(range(300), 0.5)},
    "min_tokens": {"min_tokens": 1 << 20, "stop_token_ids": (128001,)},
    "top 5 logprobs": {"logprobs": True, "top_logprobs": 5},
    "all of these": {
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "logit_bias": dict.fromkeys(range(300), 0.5),
        "min_tokens": 1 << 20,
        "stop_token_ids": (128001,),
        "logprobs": True,
        "top_logprobs": 5,
    },
    "grammar": {"grammar": grammar.from_regex("([a-z]+ )*", "regex")},
}


class Bench:
    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.context, self.steps = options.context, options.steps
        self.info = check_model(str(make_model(folder, "llama-3.1-8b")), dummy=True, tokenizer=False)
        device, kind = torch.device(options.device), TORCH_DTYPES[self.info.dtype]
        shape = BlockShape(PAGE, self.info.num_kv_heads, self.info.num_layers, self.info.head_dim, kind.itemsize)
        self.blocks = -(-(self.context + self.steps + WARM_STEPS) // PAGE)
        count = 1 + max(options.rows) * self.blocks
        pool = KvPool(allocate_region(count * shape.nbytes, device=options.device), shape, count, kind)
        pool.tensor.zero_()
        self.grammars = Grammars(self.info.path, self.info.vocab_size, self.info.eos_token_ids)
        model = load_model(self.info, BUILDERS, device=device, dummy=True)
        options = {"graphs": max(options.rows), "slots": 2 * max(options.rows), "grammars": self.grammars}
        self.worker = make_worker(model, pool, self.info, **options)
        self._step = 0

    def milliseconds(self, samplings: list[SamplingParams]) -> float:
        """Median time between two results."""
        tokens = i32(np.random.default_rng(1).integers(5, 1000, self.context).tolist())
        admits = [
            Admit(key, 1, tokens, self.context - 8, self.context - 1, self._table(key), sampling)
            for key, sampling in enumerate(samplings)
        ]
        keys, times, pending = list(range(len(samplings))), [], deque[StepOrder]()
        for step in range(self.steps):
            order = StepOrder(self._step, i64(keys), i32([1] * len(keys)), b"\1" * len(keys))
            order.admit = admits if step == 0 else []
            self._step += 1
            self.worker.launch(order)
            pending.append(order)
            if len(pending) > 1:
                pending.popleft()
                self.worker.finish()
                times.append(time.perf_counter())
        self.worker.finish()
        self.worker.step(StepOrder(self._step, b"", b"", b"", release=keys))
        return 1e3 * float(np.median(np.diff(times)[WARM_STEPS:]))

    def _table(self, key: int) -> bytes:
        return i32(list(range(1 + key * self.blocks, 1 + (key + 1) * self.blocks)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", type=lambda text: [int(one) for one in text.split(",")], default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        for rows in options.rows:
            plain = 0.0
            for name, fields in CASES.items():
                free = [SamplingParams(seed=seed) for seed in range(rows)]
                asking = [SamplingParams(seed=seed, **fields) for seed in range(rows)]
                one, every = (bench.milliseconds(case) for case in ([asking[0], *free[1:]], asking))
                plain = plain or every
                more = f"{one - plain:+8.3f} {every - plain:+8.3f}"
                print(f"{rows:4d}  {name:15s} one {one:8.3f}  all {every:8.3f}  more {more}", flush=True)
        bench.grammars.close()


if __name__ == "__main__":
    main()
