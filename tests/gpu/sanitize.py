"""Every kernel once or a few times, on odd shapes and little memory: what `sanitize.sh` runs under compute-sanitizer.

    python tests/gpu/sanitize.py [--device cuda:0] [NAME …]

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that an access beyond its end is
seen. Results are compared with the references, which compute on the CPU: hardly a kernel but pd's own is launched.
Names select the cases that contain one of them. Under TRITON_INTERPRET=1 and with --device cpu Triton interprets.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from pd.kernels import (
    attention_prefill_triton,
    attention_triton,
    linear_triton,
    reference,
    sampling_device,
    sampling_triton,
    shaping,
    shaping_triton,
    spans_triton,
    step_rows_triton,
)
from pd.kernels.activation_triton import run_silu_mul
from pd.kernels.attention import AttentionBatch, Heads, LayerKv
from pd.kernels.attention_plan import Split
from pd.kernels.bandwidth_triton import TILE, launch_read
from pd.kernels.launch import pdl_supported
from pd.kernels.linear_configs import ONE_ROW, Config, Row, Stream
from pd.kernels.norm_triton import run_norm
from pd.kernels.rope import QkNorm
from pd.kernels.rope_triton import run_rope_tables, run_rope_write
from pd.kernels.spans import Form, share_table, word_alignment
from pd.kernels.step_rows import SlotState, StepRows
from tests.kernels.attention_kit import Case, attention_case
from tests.sampling_kit import device_sampling

DEVICE = torch.device("cuda:0")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def there(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of exactly this size on the device."""
    return tensor.clone() if DEVICE.type == "cpu" else tensor.to(DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=4 * tolerance)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found.cpu(), expected)


# --- spans ---


def spans(step: int) -> np.ndarray:
    """int64[4, n] in words: spans of odd lengths and places, end to end, which fill the source and the target."""
    lengths = np.array([1, 63, 64, 65, 2047, 2048, 2049, 5000, 130, 4096]) * step
    order = np.random.default_rng(step).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    targets = np.empty_like(lengths)
    targets[order] = ends - lengths[order]
    return np.stack((np.cumsum(lengths) - lengths, targets, lengths, np.arange(len(lengths)) * 37 * step))


def span_kernels() -> None:
    for step in (1, 2):
        table = spans(step)
        words = int(table[2].sum())
        source = torch.from_numpy(np.random.default_rng(1).integers(-(2**62), 2**62, words))
        expected, empty = torch.zeros(words, dtype=torch.int64), torch.zeros(table.shape[1], dtype=torch.int64)
        reference.copy_spans(source, expected, table.T)
        digests = reference.digest_spans(source, table.T)
        here = there(source)
        for copies, sums in ((True, True), (True, False), (False, True)):
            target, found = there(torch.zeros_like(source)), there(empty)
            rows = np.ascontiguousarray(table.T)
            spans_triton.run_pass(here, target if copies else None, rows, found if sums else None)
            same(target, expected if copies else torch.zeros_like(source))
            same(found, digests if sums else empty)
        share = np.zeros((5, table.shape[1] + 1), dtype=np.int64)
        tiles = share_table(share, table)
        for form in (Form(32, 4), Form(64, 8), Form(128, 8)):
            target, found = there(torch.zeros_like(source)), there(empty)
            alignment = word_alignment(table, here, target)
            for some in itertools.pairwise((0, tiles // 3, tiles)):
                on_device = there(torch.from_numpy(share))
                spans_triton.run_share(here, target, found, on_device, alignment, some, 3, form)
            same(target, expected)
            same(found, digests)


def bandwidth() -> None:
    memory = torch.arange(3 * TILE, dtype=torch.int32)
    same(launch_read(there(memory)), memory.view(3, -1).sum(1).int())


# --- elementwise ---


def norms() -> None:
    for columns, dtype in ((1001, torch.bfloat16), (5, torch.float32), (4096, torch.float16), (8200, torch.bfloat16)):
        x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, columns), (3, columns), (columns,)))
        pdl = pdl_supported(DEVICE)
        close(run_norm(there(x), None, there(weight), 1e-5, pdl), reference.rms_norm(x, weight, 1e-5))
        total = there(residual)
        found = run_norm(there(x), total, there(weight), 1e-5, pdl)
        expected, added = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
        close(found, expected)
        close(total, added)


def activation() -> None:
    for rows, half, dtype in ((3, 7, torch.float32), (1, 1025, torch.bfloat16), (66, 2051, torch.float16)):
        gate_up = torch.randn(rows, 2 * half).to(dtype)
        close(run_silu_mul(there(gate_up), pdl_supported(DEVICE)), reference.silu_mul(gate_up))


def rotation() -> None:
    pdl = pdl_supported(DEVICE)
    for q_heads, kv_heads, dim, dtype in (
        (4, 2, 96, torch.bfloat16),
        (3, 1, 10, torch.float32),
        (14, 2, 64, torch.float16),
    ):
        positions = torch.tensor([3, 900, 70_000])
        frequencies = 10_000.0 ** -(torch.arange(0, dim, 2) / dim)
        tables = reference.rope_tables(positions, frequencies, 1.0)
        for one, table in zip(run_rope_tables(there(positions), there(frequencies), 1.0, pdl), tables, strict=True):
            close(one, table)
        blocks, offsets = torch.tensor([4, 1, 4]), torch.tensor([0, 5, 2])
        gains = torch.randn(2, dim).to(dtype)
        qkv = torch.randn(3, (q_heads + 2 * kv_heads) * dim).to(dtype)
        for normed in (False, True):
            expected, pool = (torch.zeros(2, 5, kv_heads, 6, dim, dtype=dtype) for _ in range(2))
            norm = QkNorm(gains[0], gains[1], 1e-6) if normed else None
            batch = AttentionBatch(positions, blocks, offsets, (), ())
            whole = reference.rope_write_kv(qkv.clone(), *tables, LayerKv(*expected), batch, norm)
            found = there(pool)
            batch = AttentionBatch(there(positions), there(blocks.int()), there(offsets.int()), (), ())
            norm = QkNorm(there(gains[0]), there(gains[1]), 1e-6) if normed else None
            heads = run_rope_write(there(qkv), *map(there, tables), LayerKv(*found), batch, norm, pdl)
            for one, other in zip((*heads, found), (*whole, expected), strict=True):
                close(one, other)


# --- projections ---

CONFIGS: tuple[tuple[Config, int], ...] = (
    (Stream(64, 256, 4, 4), 7),
    (Stream(64, 128, 4, 4, per_sm=2), 13),
    (Stream(64, 256, 3, 4, tma=True), 5),
    (Stream(128, 64, 4, 8), 100),
    (Stream(64, 128, 3, 4, per_sm=0, split=4), 8),
    (Stream(64, 128, 3, 4, per_sm=2, tma=True, pdl=True, prefetch=4, early=True), 9),
    (Row(4, 1024, 4), 1),
    (ONE_ROW, 1),
)


def projections() -> None:
    """Columns in multiples of 16 bytes, as the kernels ask; rows of the weight that no tile divides."""
    interpreted = DEVICE.type == "cpu"
    for config, rows in CONFIGS:
        if interpreted:
            config = replace(config, pdl=False)
        for n, k in ((72, 48), (200, 1040)):
            dtype = torch.float16 if interpreted else torch.bfloat16
            x, weight, bias = (
                torch.randn(rows, k).to(dtype),
                (torch.randn(n, k) / k**0.5).to(dtype),
                torch.randn(n).to(dtype),
            )
            found = linear_triton.launch(there(x), there(weight), there(bias), config)
            exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
            torch.testing.assert_close(found.cpu().float(), exact, rtol=1e-2, atol=1e-2)


# --- attention ---


def on_cpu(case: Case) -> Case:
    heads, kv, batch = case
    moved = {name: value.cpu() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return Case(Heads(*(one.cpu() for one in heads)), LayerKv(*(one.cpu() for one in kv)), replace(batch, **moved))


DECODE = [(1, context) for context in (1, 0, 16, 33, 64, 700)]
PROMPTS = [(1, 40), (1, 3), (1, 0), (5, 5), (2, 70), (70, 203), (41, 41)]
SHAPES = (
    {"group": 4, "kv_heads": 2, "head_dim": 128, "page": 32, "dtype": torch.bfloat16},
    {"group": 7, "kv_heads": 1, "head_dim": 64, "page": 16, "dtype": torch.float16},
    {"group": 1, "kv_heads": 3, "head_dim": 96, "page": 64, "dtype": torch.bfloat16},
    {"group": 2, "kv_heads": 1, "head_dim": 256, "page": 32, "dtype": torch.float32},
)


def shapes() -> list[dict[str, object]]:
    """The interpreter has no bfloat16 products."""
    interpreted = DEVICE.type == "cpu"
    return [
        {**one, "dtype": torch.float16} if interpreted and one["dtype"] == torch.bfloat16 else one for one in SHAPES
    ]


def decode_attention() -> None:
    for shape, (window, parts) in itertools.product(shapes(), ((0, 1), (0, 3), (20, 3))):
        case = attention_case(DECODE, device=str(DEVICE), spare=0, arrivals=parts > 1 and not window, **shape)
        heads, kv, batch = case
        out = torch.full_like(heads.q, float("nan"), memory_format=torch.contiguous_format).flatten(1)
        attention_triton.decode_attention(heads.q, kv, batch, out, 0.2, window, Split(parts, 16))
        close(out, reference.paged_attention_device(*on_cpu(case), 0.2, window))


def prompt_attention() -> None:
    for shape, (window, parts) in itertools.product(shapes(), ((0, 1), (20, 3))):
        case = attention_case(PROMPTS, device=str(DEVICE), spare=0, **shape)
        heads, kv, batch = case
        assert batch.tiles is not None
        out = torch.full_like(heads.q, float("nan"), memory_format=torch.contiguous_format).flatten(1)
        attention_prefill_triton.prompt_attention(
            heads.q, kv, batch, out, 0.2, window, batch.tiles, None, Split(parts, 16)
        )
        close(out[3:], reference.paged_attention_device(*on_cpu(case), 0.2, window)[3:])


# --- sampling ---


def sampling() -> None:
    for rows, vocab, restricted in (
        (3, 1, True),
        (3, 1023, False),
        (5, 4097, True),
        (40, 1000, True),
        (2, 20_003, True),
    ):
        limits = {"top_k": [0, 20], "top_p": [0.9, 1.0, 0.8], "min_p": [0.0, 0.0, 0.0, 0.01]} if restricted else {}
        logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))
        for dtype in (torch.float32, torch.float16):
            given = logits.to(dtype)
            params = (
                device_sampling(rows, temperature=[1.0, 0.0, 1.5], device=where, **limits)
                for where in (str(DEVICE), "cpu")
            )
            tokens, logprobs = sampling_triton.sample_rows(there(given), next(params), restricted, None, True)
            expected, others = sampling_device.sample_rows(given, next(params), restricted=restricted, logprobs=True)
            assert logprobs is not None and others is not None
            equal = tokens.cpu() == expected
            assert int((~equal).sum()) <= 1, "but for two scores that are nearly the same"
            torch.testing.assert_close(logprobs.cpu()[equal], others[equal], rtol=1e-4, atol=1e-4)


def shaping_kernels() -> None:
    for vocab in (1, 33, 4100):
        rows, slots = 4, torch.tensor([2, -1, 0, 3], dtype=torch.int32)
        rates = [torch.linspace(0.7, 1.5, rows) for _ in range(3)]
        words = (vocab + 31) // 32
        seen = torch.randint(-(2**31), 2**31, (5, words)).int()
        counts = torch.randint(-3, 3, (5, vocab)).clamp_(min=0).short()
        logits = torch.randn(rows, vocab)
        tokens = torch.randint(0, vocab, (rows,)).int()
        entries = torch.randperm((vocab + 2) * rows)[:100]
        bias = (entries % rows).int() - 1, (entries // rows).int() - 1, torch.randn(len(entries))
        which, masks = torch.tensor([3, -1, 0], dtype=torch.int32), torch.randint(-(2**31), 2**31, (3, words)).int()
        found, counted = there(logits), there(counts)
        shaping_triton.apply_penalties(found, shaping.Penalties(*map(there, (slots, *rates))), there(seen), counted)
        shaping_triton.count_tokens(counted, there(slots), there(tokens))
        shaping_triton.add_bias_rows(found, *map(there, bias))
        shaping_triton.forbid_rows(found, there(which), there(masks))
        shaping.apply_penalties(logits, shaping.Penalties(slots, *rates), seen, counts)
        shaping.count_tokens(counts, slots, tokens)
        shaping.add_bias_rows(logits, *bias)
        shaping.forbid_rows(logits, which, masks)
        close(found, logits)
        same(counted, counts)


def step_rows() -> None:
    slots, width, page = 9, 300, 4
    tables = torch.randint(1, 1000, (slots, width)).int()
    tables[-1] = 0
    last, params = torch.randint(0, 500, (slots,)).int(), torch.randint(-(2**31), 2**31 - 1, (slots, 8)).int()

    def columns() -> list[torch.Tensor]:
        return [
            torch.tensor(values, dtype=torch.int32)
            for values in (
                (3, 0, 5, slots - 1, 2),
                (17, 1, 290 * page, 0, 12),
                (777, -1, -1, -1, -1),
                (-1, 42, -1, 0, 7, 8, 9),
                (16, 0, 290 * page - 1, 0, 9, 10, 11),
                (-5, -5, -5, -5, 11, 11, 12),
                (-5, -5, -5, -5, 1, 2, 3),
            )
        ]

    expected = StepRows(*columns(), tables=torch.zeros(5, width, dtype=torch.int32), decode=4)
    found = StepRows(*map(there, columns()), tables=there(expected.tables), decode=4)
    state, other = SlotState(tables, last, params), SlotState(*map(there, (tables, last, params)))
    step_rows_triton.launch_prepare_rows(other, found, page)
    reference.prepare_rows(state, expected, page)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            same(getattr(found, name), value)
    which, lengths = torch.arange(130, dtype=torch.int32) % slots, torch.arange(130, dtype=torch.int32) + 5
    gathered = step_rows_triton.launch_gather_sampling(other, there(which), there(lengths))
    for name, value in vars(reference.gather_sampling(state, which, lengths)).items():
        assert getattr(gathered, name).cpu().numpy().tobytes() == value.numpy().tobytes()
    step_rows_triton.launch_store_last(other, there(which[:3]), there(lengths[:3]))
    last[which[:3].long()] = lengths[:3]
    same(other.last, last)


CASES: dict[str, Callable[[], None]] = {
    "spans": span_kernels,
    "bandwidth": bandwidth,
    "norms": norms,
    "activation": activation,
    "rotation": rotation,
    "projections": projections,
    "decode-attention": decode_attention,
    "prompt-attention": prompt_attention,
    "sampling": sampling,
    "shaping": shaping_kernels,
    "step-rows": step_rows,
}


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--list", action="store_true", help="say which cases these are, and run none")
    options = parser.parse_args()
    DEVICE = torch.device(options.device)
    for name, run in CASES.items():
        if options.names and not any(one in name for one in options.names):
            continue
        if options.list:
            print(name)
        else:
            torch.manual_seed(1)
            start = time.monotonic()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
