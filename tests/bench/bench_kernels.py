"""How fast spans of a GPU's memory are digested and copied, beside a plain copy in the same run.

    python tests/bench/bench_kernels.py [--device cuda:0] [--sizes 32,256,2048,4096] [--total 1024] [--pool 4096]

`total` MiB in spans of each size (KiB), scattered over a pool of `pool` MiB, are digested where they are, gathered into
a contiguous buffer, copied to other random places, and that with digests. GB/s count what is read and written: a copy
moves every byte twice. `ratio` is by the plain copy's rate. These figures are of the kernels alone; `op us` is what one
whole copy with digests takes, tables made and brought to the device. The last line is one block of 4 MiB by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pd.kernels.block_copy import copy_and_digest  # noqa: E402
from pd.kernels.digest import digest_spans  # noqa: E402
from pd.kernels.spans import as_words  # noqa: E402
from pd.kernels.spans_triton import prepare_pass  # noqa: E402
from pd.runner.timing import device_times  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
ROUNDS, REPEATS = 10, 5


def device_seconds(run: Callable[[], object]) -> float:
    """Per run on the device, the median of REPEATS."""
    return float(np.median(device_times(run, rounds=ROUNDS, repeats=REPEATS, warm_up=3)))


def whole_seconds(run: Callable[[], object]) -> float:
    """Per run as its caller sees it, the median of REPEATS."""
    found = []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return float(np.median(found[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sizes", default="32,64,128,256,512,1024,2048,4096")
    parser.add_argument("--total", type=int, default=1024)
    parser.add_argument("--pool", type=int, default=4096)
    options = parser.parse_args()
    total = options.total * MIB
    with torch.cuda.device(options.device):
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        pool = torch.randint(-(2**63), 2**63 - 1, (options.pool * MIB // 8,), device=options.device)
        other, packed = torch.zeros_like(pool), torch.zeros(total // 8, dtype=torch.int64, device=options.device)
        plain = device_seconds(lambda: packed.copy_(pool[: total // 8]))
        print(f"plain copy of {options.total} MiB: {2 * total / plain / 1e9:.0f} GB/s")
        print("  KiB   spans |  digest ratio |  gather ratio |    copy ratio | +digest ratio |  op us")
        for size in (int(one) * KIB for one in options.sizes.split(",")):
            count, places = total // size, options.pool * MIB // size
            rng = np.random.default_rng(size)
            table = np.zeros((count, 4), dtype=np.int64)
            table[:, 0], table[:, 1] = (rng.permutation(places)[:count] * (size // 8) for _ in range(2))
            table[:, 2] = size // 8
            gathered = table.copy()
            gathered[:, 1] = np.arange(count) * (size // 8)
            digests = torch.zeros(count, dtype=torch.int64, device=options.device)
            passes = [
                (1, prepare_pass(pool, None, table, digests)),
                (2, prepare_pass(pool, packed, gathered, None)),
                (2, prepare_pass(pool, other, table, None)),
                (2, prepare_pass(pool, other, table, digests)),
            ]
            line = f"{size // KIB:5d} {count:7d}"
            for moved, run in passes:
                rate = moved * total / device_seconds(run)
                line += f" | {rate / 1e9:7.0f} {rate * plain / (2 * total):5.2f}"
            spans, positions = table[:, :3] * 8, table[:, 3]
            whole = whole_seconds(lambda s=spans, p=positions: copy_and_digest(pool, other, s, p))  # type: ignore[misc]
            print(f"{line} | {whole * 1e6:6.0f}", flush=True)
        one = np.array([[4 * MIB, 4 * MIB, 0]], dtype=np.int64)
        kernel = device_seconds(prepare_pass(as_words(pool), None, np.array([[0, 0, MIB // 2, 0]]), digests[:1]))
        op = whole_seconds(lambda: digest_spans(pool, one))
        print(f"one digest of 4 MiB: {kernel * 1e6:.1f} us on the device, {op * 1e6:.0f} us for its caller")


if __name__ == "__main__":
    main()
