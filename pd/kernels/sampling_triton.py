"""Sampling on the GPU in two launches: a pick in each tile of each row's logits, then the best pick of each row.

The first launch works at the speed of its random numbers, so it ranks by a score that costs two fast logarithms and no
division. That score is off by less than `_margin`; where it leaves more than one token of a tile to choose from, which
it seldom does, that tile is ranked by exact scores. The second launch compares the picks, a few per row, by these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pd.kernels.cuts_triton import COLDEST, LOG2_E, NONE, find_cuts
from pd.kernels.launch import columns

if TYPE_CHECKING:
    from pd.kernels.sampling_device import DeviceSampling

#: Tokens of a tile: few when few rows have to keep all multiprocessors busy.
SMALL_TILE, TILE = 1024, 4096
SMALL_ROWS = 16
WARPS = {SMALL_TILE: 4, TILE: 8}
BEST_WARPS = 4

_WORD = tl.constexpr(2.0**-32)
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
_ROUGH_WORD = tl.constexpr(2.0**-32 * (1.0 - 2.0**-23))  # never makes one
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _philox(seed, column, position, choice):
    """`pd.kernels.philox.philox` of the counter (column, position, choice, 0): four uint32 of column's shape.

    Products of 64 bits are one instruction where the high and the low half apart are two (`tl.philox`).
    """
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    c0, c1, c2 = column.to(tl.uint32), position.to(tl.uint32), choice.to(tl.uint32)
    c3 = choice.to(tl.uint32) * 0
    for _ in tl.static_range(10):
        left, right = c0.to(tl.uint64) * _MULTIPLIER_0, c2.to(tl.uint64) * _MULTIPLIER_1
        c0, c1 = (right >> 32).to(tl.uint32) ^ c1 ^ k0, right.to(tl.uint32)
        c2, c3 = (left >> 32).to(tl.uint32) ^ c3 ^ k1, left.to(tl.uint32)
        k0, k1 = k0 + _WEYL_0, k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _fast_log2(x):
    """Off by 2**-22 where x is between 1/2 and 2, else by 2**-22 of the result: tl.log2 costs a dozen instructions."""
    if _INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _uniform(words):
    """uint32 -> float32 in (0, 1), as `pd.kernels.philox.gumbel` makes them."""
    return tl.minimum((words.to(tl.float32) + 0.5) * _WORD, _BELOW_ONE)


@triton.jit
def _gumbel(words):
    """uint32 -> standard Gumbel noise, within two units in the last place of `pd.kernels.philox.gumbel`.

    log1p(-u) as log(y) * u / (1 - y), y = 1 - u rounded, which cancels the rounding (Kahan, in HP-15C Advanced
    Functions Handbook, 1982).
    """
    uniform = _uniform(words)
    rest = 1.0 - uniform
    ratio = uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest)
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * ratio)
    return -tl.log(exponential)


@triton.jit
def _rough_gumbel(words):
    """uint32 -> Gumbel noise over log(2), plus a constant, off by less than 1e-4."""
    uniform = words.to(tl.float32) * _ROUGH_WORD + 0.5 * _ROUGH_WORD
    series = uniform * (LOG2_E + uniform * (0.5 * LOG2_E))
    return -_fast_log2(tl.where(uniform < 2.0**-8, series, -_fast_log2(1.0 - uniform)))


@triton.jit
def _margin(score):
    """How far two rough scores of about this size may be apart for their order to be in doubt."""
    return 0.001 + tl.minimum(tl.abs(score), 1e30) * 1e-6


@triton.jit
def _words(seed, choice, position, column, COLUMNS: tl.constexpr):
    """uint32[COLUMNS, 4]: the random words of the tokens from 4 * column."""
    a, b, c, d = _philox(seed, column + tl.arange(0, COLUMNS), position, choice)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (COLUMNS, 4))


@triton.jit
def _words_of(seed, choice, position, tokens):
    """uint32, one word for each of these tokens."""
    a, b, c, d = _philox(seed, tokens // 4, position, choice)
    lane = tokens % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def _first(scores, best, ids):
    """The smallest id of those whose score is `best`; -1 where none is, being NaN."""
    first = tl.min(tl.min(tl.where(scores == best, ids, NONE), 1), 0)
    return tl.where(first == NONE, -1, first)


@triton.jit
def _highest(scores):
    return tl.max(tl.max(scores, 1), 0)


@triton.jit
def _draw(x, ids, temperature, seed, choice, position, column, COLUMNS: tl.constexpr):
    """The id of the best of x / temperature + noise among x float32[COLUMNS, 4]; of -inf and NaN only, -1."""
    words = _words(seed, choice, position, column, COLUMNS)
    rough = x * (LOG2_E / temperature) + _rough_gumbel(words)
    best = _highest(rough)
    # One sum tells whether a single token is near the best, and which: more than one make it at least 8 * COLUMNS.
    near = tl.where(rough >= best - _margin(best), ids + (4 * COLUMNS - 4 * column), 0)
    total = tl.sum(tl.sum(near, 1), 0)
    pick = -1
    if (total >= 4 * COLUMNS) & (total < 8 * COLUMNS):
        pick = 4 * column + total - 4 * COLUMNS
    elif best > float("-inf"):
        scores = tl.div_rn(x, tl.full((COLUMNS, 4), 0.0, tl.float32) + temperature) + _gumbel(words)
        pick = _first(scores, _highest(scores), ids)
    return pick


@triton.jit
def _pick(x, ids, row, temperatures, seeds, choices, positions, column, COLUMNS: tl.constexpr, SOME: tl.constexpr):
    """-1 where there is nothing to pick, which a tile of which only some tokens are left finds out first."""
    temperature = tl.load(temperatures + row)
    seed, choice, position = tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
    pick = -1
    if temperature < COLDEST:
        pick = _first(x, _highest(x), ids)
    elif SOME:
        if _highest(x) > float("-inf"):
            pick = _draw(x, ids, temperature, seed, choice, position, column, COLUMNS)
    else:
        pick = _draw(x, ids, temperature, seed, choice, position, column, COLUMNS)
    return pick


@triton.jit
def pick_pass(
    logits,
    raw,
    temperatures,
    seeds,
    choices,
    positions,
    cuts,
    last_ties,
    picks,
    highs,
    sums,
    stride,
    raw_stride,
    vocab,
    TILE: tl.constexpr,
):
    """Grid (tiles, rows): picks int32[rows, tiles], of what `cuts` and `last_ties` leave where they are given.

    With `highs` and `sums` float32[rows, tiles], also each tile's highest logit and its sum of exp(logit - highest);
    of `raw` where that is given.
    """
    tile, row = tl.program_id(0), tl.program_id(1)
    column = tile * (TILE // 4)
    ids = 4 * (column + tl.arange(0, TILE // 4))[:, None] + tl.arange(0, 4)[None, :]
    inside = ids < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    at = row * tl.num_programs(0) + tile
    kept = x
    if cuts is not None:
        cut, last = tl.load(cuts + row), tl.load(last_ties + row)
        kept = tl.where((x > cut) | ((x == cut) & (ids <= last)), x, float("-inf"))
    pick = _pick(kept, ids, row, temperatures, seeds, choices, positions, column, TILE // 4, cuts is not None)
    tl.store(picks + at, pick)
    if highs is not None:
        y = x
        if raw is not None:
            y = tl.load(raw + row.to(tl.int64) * raw_stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
        high = _highest(y)
        base = tl.where(high == float("-inf"), 0.0, high)
        tl.store(highs + at, high)
        tl.store(sums + at, tl.sum(tl.sum(tl.exp2((y - base) * LOG2_E), 1), 0))


@triton.jit(do_not_specialize=["tiles"])
def best_pass(
    logits,
    raw,
    temperatures,
    seeds,
    choices,
    positions,
    picks,
    highs,
    sums,
    tokens,
    logprobs,
    stride,
    raw_stride,
    vocab,
    tiles,
    LANES: tl.constexpr,
):
    """Grid (rows,): the best of each row's picks, and with `highs` and `sums` its logprob."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    at = row * tiles + lanes
    ids = tl.load(picks + at, mask=lanes < tiles, other=-1)
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids >= 0, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    if temperature >= COLDEST:
        words = _words_of(tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row), ids)
        x = tl.div_rn(x, tl.full((LANES,), 0.0, tl.float32) + temperature) + _gumbel(words)
    token = tl.min(tl.where((x == tl.max(x, 0)) & (ids >= 0), ids, NONE), 0)
    token = tl.where(token == NONE, 0, token)  # all were -inf or NaN
    tl.store(tokens + row, token)
    if highs is not None:
        high = tl.load(highs + at, mask=lanes < tiles, other=float("-inf"))
        highest = tl.max(high, 0)
        part = tl.load(sums + at, mask=lanes < tiles, other=0.0) * tl.exp2((high - highest) * LOG2_E)
        if raw is not None:
            chosen = tl.load(raw + row.to(tl.int64) * raw_stride + token).to(tl.float32)
        else:
            chosen = tl.load(logits + row.to(tl.int64) * stride + token).to(tl.float32)
        tl.store(logprobs + row, chosen - highest - tl.log(tl.sum(part, 0)))


def sample_rows(
    logits: torch.Tensor, sampling: DeviceSampling, restricted: bool, raw: torch.Tensor | None, logprobs: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`pd.kernels.sampling_device.sample_rows`, whose arguments are checked; `raw` is None where it is `logits`."""
    rows, vocab = logits.shape
    tile = SMALL_TILE if rows <= SMALL_ROWS else TILE
    tiles = triton.cdiv(vocab, tile)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    picks = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)
    highs = sums = chosen = None
    if logprobs:
        highs, sums = columns(2, rows * tiles, torch.float32, logits.device)
        chosen = torch.empty(rows, dtype=torch.float32, device=logits.device)
    cuts = find_cuts(logits, sampling) if restricted else (None, None)
    keys = sampling.temperature, sampling.seed, sampling.choice, sampling.position
    found = picks, highs, sums
    strides = logits.stride(0), 0 if raw is None else raw.stride(0)
    with torch.cuda.device_of(logits):
        options = {"num_warps": WARPS[tile], "enable_fp_fusion": True}
        pick_pass[(tiles, rows)](logits, raw, *keys, *cuts, *found, *strides, vocab, TILE=tile, **options)
        lanes = triton.next_power_of_2(tiles)
        options = {"num_warps": BEST_WARPS, "enable_fp_fusion": True}
        best_pass[(rows,)](logits, raw, *keys, *found, tokens, chosen, *strides, vocab, tiles, LANES=lanes, **options)
    return tokens, chosen
