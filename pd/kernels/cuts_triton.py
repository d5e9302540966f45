"""Top-k, top-p and min-p on the GPU without a sort: each row's cut, a logit, and the last id that ties with it.

All three keep the first so many tokens in the order of falling logits, equal ones by id, so together they keep those
above a cut and, of those that equal it, the first few. One program per row finds the cut by bisection: each pass over
the row's logits (which stay in the cache) tries three pivots at once, until so few tokens are left between its bounds
that they fit in registers. Bounds are float32 as integers of the same order, so bisection of them ends after 17 steps.

Dividing by the temperature keeps the order, so logits are compared as they are. Where the division would make equal
what differs by one unit in the last place, ties go by logit before they go by id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pd.kernels.launch import columns

if TYPE_CHECKING:
    from pd.kernels.sampling_device import DeviceSampling

SURVEY_TILE = 4096
#: Logits that a pass looks at together.
CHUNK = 4096
#: Tokens that fit in registers.
FEW = 2048
SURVEY_WARPS, CUT_WARPS = 8, 16

#: A temperature below this is greedy.
COLDEST = tl.constexpr(1e-5)
LOG2_E = tl.constexpr(1.4426950408889634)
#: No id, and after all of them.
NONE = tl.constexpr(2**31 - 1)

#: Passes whose pivots divide the interval of values evenly, which is best while there are many; later ones its keys.
_EVEN_PASSES = tl.constexpr(6)


@triton.jit
def _key(value):
    """float32 -> int64 of the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    """The float32 that has this key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _is_restricted(temperature, top_k, top_p, min_p, vocab):
    return (temperature >= COLDEST) & (((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def survey_pass(
    logits, temperatures, top_ks, top_ps, min_ps, highs, lows, sums, counts, stride, vocab, TILE: tl.constexpr
):
    """Grid (tiles, rows), of restricted rows: each tile's highest and lowest logit, its mass and its count of tokens.

    Of those that can be drawn at all. A token's mass is exp((logit - highest) / temperature), of its tile's highest.
    """
    tile, row = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    if _is_restricted(temperature, top_k, top_p, min_p, vocab):
        ids = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        high = tl.max(x, 0)
        base = tl.where(high == float("-inf"), 0.0, high)
        at = row * tl.num_programs(0) + tile
        tl.store(highs + at, high)
        tl.store(lows + at, tl.min(tl.where(x > float("-inf"), x, float("inf")), 0))
        tl.store(sums + at, tl.sum(tl.exp2((x - base) * (LOG2_E / temperature)), 0))
        tl.store(counts + at, tl.sum((x > float("-inf")).to(tl.int32), 0))


@triton.jit
def _measure_row(row, vocab, high, scale, a, b, c, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """How many of a row's tokens are above each of three values, which rise, and with MASS what these tokens weigh."""
    lanes = tl.arange(0, CHUNK)
    counts = tl.zeros((CHUNK,), tl.int32)  # three of ten bits each: a row has fewer than 1,024 chunks
    mass_a, mass_b, mass_c = counts.to(tl.float32), counts.to(tl.float32), counts.to(tl.float32)
    for start in tl.range(0, vocab, CHUNK, loop_unroll_factor=2):
        x = tl.load(row + start + lanes, mask=start + lanes < vocab, other=float("-inf")).to(tl.float32)
        counts += tl.where(x > a, 1, 0) + tl.where(x > b, 1 << 10, 0) + tl.where(x > c, 1 << 20, 0)
        if MASS:
            mass = tl.exp2((x - high) * scale)
            mass_a += tl.where(x > a, mass, 0.0)
            mass_b += tl.where(x > b, mass, 0.0)
            mass_c += tl.where(x > c, mass, 0.0)
    count_a, count_b, count_c = tl.sum(counts & 1023, 0), tl.sum((counts >> 10) & 1023, 0), tl.sum(counts >> 20, 0)
    return count_a, count_b, count_c, tl.sum(mass_a, 0), tl.sum(mass_b, 0), tl.sum(mass_c, 0)


@triton.jit
def _measure(x, high, scale, a, b, c, MASS: tl.constexpr, FEW: tl.constexpr):
    """`_measure_row` of FEW tokens in registers."""
    above_a, above_b, above_c = (x > a).to(tl.int32), (x > b).to(tl.int32), (x > c).to(tl.int32)
    mass = tl.zeros((FEW,), tl.float32)
    if MASS:
        mass = tl.exp2((x - high) * scale)
    mass_a, mass_b, mass_c = mass * above_a, mass * above_b, mass * above_c
    count_a, count_b, count_c = tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)
    return count_a, count_b, count_c, tl.sum(mass_a, 0), tl.sum(mass_b, 0), tl.sum(mass_c, 0)


@triton.jit
def _even(low, high, part):
    """A key strictly between two, whose value is a part of the way from the one's value to the other's."""
    first, last = _value(low), _value(high)
    return tl.minimum(tl.maximum(_key(first + (last - first) * part), low + 1), high - 1)


@triton.jit
def _narrow(low, high, over_low, over_high, mass, a, b, c, na, nb, nc, ma, mb, mc, target, MASS: tl.constexpr):
    """The bounds among low < a <= b <= c < high between which the target is crossed; see `_search`."""
    if MASS:
        reach_a, reach_b, reach_c = ma >= target, mb >= target, mc >= target
    else:
        reach_a, reach_b, reach_c = na >= target, nb >= target, nc >= target
    new_low = tl.where(reach_c, c, tl.where(reach_b, b, tl.where(reach_a, a, low)))
    new_over_low = tl.where(reach_c, nc, tl.where(reach_b, nb, tl.where(reach_a, na, over_low)))
    new_high = tl.where(reach_c, high, tl.where(reach_b, c, tl.where(reach_a, b, a)))
    new_over_high = tl.where(reach_c, over_high, tl.where(reach_b, nc, tl.where(reach_a, nb, na)))
    new_mass = tl.where(reach_c, mass, tl.where(reach_b, mc, tl.where(reach_a, mb, ma)))
    return new_low, new_high, new_over_low, new_over_high, new_mass


@triton.jit
def _gather(row, vocab, few, low, high, CHUNK: tl.constexpr):
    """Write the ids of a row's tokens with low < logit <= high to `few`, in rising order; returns how many.

    Loads a chunk ahead: each waits for a sum over the one before.
    """
    lanes = tl.arange(0, CHUNK)
    found = 0
    ahead = tl.load(row + lanes, mask=lanes < vocab, other=float("-inf"))
    for start in tl.range(0, vocab, CHUNK):
        x, ids = ahead.to(tl.float32), start + lanes
        ahead = tl.load(row + ids + CHUNK, mask=ids + CHUNK < vocab, other=float("-inf"))
        wanted = ((x > low) & (x <= high)).to(tl.int32)
        count = tl.sum(wanted, 0)
        if count > 0:
            tl.store(few + found + tl.cumsum(wanted, 0) - 1, ids, mask=wanted > 0)
        found += count
    return found


@triton.jit
def _load_few(row, few, found, FEW: tl.constexpr):
    """The tokens that `_gather` has found, as (ids, logits); -inf beyond them."""
    lanes = tl.arange(0, FEW)
    ids = tl.load(few + lanes, mask=lanes < found, other=0)
    return ids, tl.load(row + ids, mask=lanes < found, other=float("-inf")).to(tl.float32)


@triton.jit
def _search(
    row,
    vocab,
    few,
    low,
    high,
    over_low,
    target,
    highest,
    scale,
    MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Bisect keys until high is low + 1, while the tokens above low reach the target and those above high do not.

    What reaches it is their number or, with MASS, their mass. Returns that high's value, the number of tokens above it,
    their mass, the number of tokens that equal it, and how many `few` holds in the end: these among them, or none.
    `over_low` is the number above low, or more.
    """
    over_high, mass = 0, 0.0
    passes, found = 0, 0
    while (over_low - over_high > FEW) & (high - low > 1):
        if passes < _EVEN_PASSES:
            a, b, c = _even(low, high, 0.25), _even(low, high, 0.5), _even(low, high, 0.75)
        else:
            a, b, c = low + (high - low + 3) // 4, low + (high - low + 1) // 2, high - (high - low + 3) // 4
        na, nb, nc, ma, mb, mc = _measure_row(row, vocab, highest, scale, _value(a), _value(b), _value(c), MASS, CHUNK)
        low, high, over_low, over_high, mass = _narrow(
            low, high, over_low, over_high, mass, a, b, c, na, nb, nc, ma, mb, mc, target, MASS
        )
        passes += 1
    if high - low > 1:
        found = _gather(row, vocab, few, _value(low), _value(high), CHUNK)
        tl.debug_barrier()
        _, x = _load_few(row, few, found, FEW)
        tl.debug_barrier()
        before, mass_before = over_high, mass
        over_low = before + found
        while high - low > 1:
            a, b, c = low + (high - low + 3) // 4, low + (high - low + 1) // 2, high - (high - low + 3) // 4
            na, nb, nc, ma, mb, mc = _measure(x, highest, scale, _value(a), _value(b), _value(c), MASS, FEW)
            low, high, over_low, over_high, mass = _narrow(
                low,
                high,
                over_low,
                over_high,
                mass,
                a,
                b,
                c,
                before + na,
                before + nb,
                before + nc,
                mass_before + ma,
                mass_before + mb,
                mass_before + mc,
                target,
                MASS,
            )
    return _value(high), over_high, mass, over_low - over_high, found


@triton.jit
def _last_tie(row, vocab, cut, keep, CHUNK: tl.constexpr):
    """The id of the `keep`th token whose logit is `cut`."""
    lanes = tl.arange(0, CHUNK)
    start, seen, last = 0, 0, NONE
    while (seen < keep) & (start < vocab):
        ids = start + lanes
        ties = (tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32) == cut).to(tl.int32)
        count = tl.sum(ties, 0)
        if seen + count >= keep:
            last = tl.min(tl.where((ties > 0) & (seen + tl.cumsum(ties, 0) == keep), ids, NONE), 0)
        seen += count
        start += CHUNK
    return last


@triton.jit
def _last_tie_of_few(row, few, found, cut, keep, FEW: tl.constexpr):
    """`_last_tie` among tokens that `_gather` has found."""
    ids, x = _load_few(row, few, found, FEW)
    ties = (x == cut).to(tl.int32)
    return tl.min(tl.where((ties > 0) & (tl.cumsum(ties, 0) == keep), ids, NONE), 0)


@triton.jit(do_not_specialize=["tiles"])
def cut_pass(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    highs,
    lows,
    sums,
    counts,
    few,
    cuts,
    last_ties,
    stride,
    vocab,
    tiles,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Grid (rows,): what each row keeps: logits above its cut, and of those equal to it the ids up to `last_ties`."""
    index = tl.program_id(0)
    temperature = tl.load(temperatures + index)
    top_k, top_p, min_p = tl.load(top_ks + index), tl.load(top_ps + index), tl.load(min_ps + index)
    cut, last = float("-inf"), NONE
    if _is_restricted(temperature, top_k, top_p, min_p, vocab):
        row = logits + index.to(tl.int64) * stride
        few += index.to(tl.int64) * FEW
        scale = LOG2_E / temperature
        lanes = tl.arange(0, LANES)
        at = index * tiles + lanes
        tile_highs = tl.load(highs + at, mask=lanes < tiles, other=float("-inf"))
        highest = tl.max(tile_highs, 0)
        lowest = tl.min(tl.load(lows + at, mask=lanes < tiles, other=float("inf")), 0)
        total = tl.sum(tl.load(counts + at, mask=lanes < tiles, other=0), 0)
        weights = tl.exp2((tile_highs - highest) * scale)
        mass = tl.sum(tl.load(sums + at, mask=lanes < tiles, other=0.0) * weights, 0)
        ties, keep, found = 0, 0, 0
        if (top_k > 0) & (top_k < total):
            cut, over, _, ties, found = _search(
                row,
                vocab,
                few,
                _key(lowest) - 1,
                _key(highest),
                total,
                top_k,
                highest,
                scale,
                False,
                CHUNK,
                FEW,
            )
            keep = top_k - over
        if (top_p < 1.0) & (total > 0):
            # All the tokens so far below the best together weigh less than what top-p leaves out.
            bound = highest - (tl.log2(total.to(tl.float32)) - tl.log2(1.0 - top_p) + 2.0) / scale
            low, over_low, above = tl.maximum(_key(lowest) - 1, _key(bound)), total, mass
            if keep > 0:
                over_low, _, _, above, _, _ = _measure_row(row, vocab, highest, scale, cut, cut, cut, True, CHUNK)
                mass = above + keep * tl.exp2((cut - highest) * scale)
                low = tl.maximum(low, _key(cut))
            target = top_p * mass
            if above >= target:
                cut, _, above, ties, found = _search(
                    row, vocab, few, low, _key(highest), over_low, target, highest, scale, True, CHUNK, FEW
                )
                keep = ties
            # Of those that equal the cut, as many as begin below the target; the best token always stays.
            room = tl.ceil((target - above) / tl.exp2((cut - highest) * scale))
            keep = tl.maximum(tl.minimum(room, keep * 1.0).to(tl.int32), 1)
        if keep < ties:
            if found > 0:
                last = _last_tie_of_few(row, few, found, cut, keep, FEW)
            else:
                last = _last_tie(row, vocab, cut, keep, CHUNK)
        if min_p > 0.0:
            least = tl.minimum(highest + tl.log2(min_p) / scale, highest)
            if least > cut:
                cut, last = _value(_key(least) - 1), NONE
    tl.store(cuts + index, cut)
    tl.store(last_ties + index, last)


def find_cuts(logits: torch.Tensor, sampling: DeviceSampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the cut float32[S] and the last id among its ties int32[S]; -inf and no bound where all is kept."""
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, SURVEY_TILE)
    highs, lows, sums = columns(3, rows * tiles, torch.float32, logits.device)
    counts = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)
    few = torch.empty(rows, FEW, dtype=torch.int32, device=logits.device)
    cuts = torch.empty(rows, dtype=torch.float32, device=logits.device)
    last_ties = torch.empty(rows, dtype=torch.int32, device=logits.device)
    limits = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    survey = highs, lows, sums, counts
    with torch.cuda.device_of(logits):
        survey_pass[(tiles, rows)](
            logits,
            *limits,
            *survey,
            logits.stride(0),
            vocab,
            TILE=SURVEY_TILE,
            num_warps=SURVEY_WARPS,
            enable_fp_fusion=True,
        )
        cut_pass[(rows,)](
            logits,
            *limits,
            *survey,
            few,
            cuts,
            last_ties,
            logits.stride(0),
            vocab,
            tiles,
            LANES=triton.next_power_of_2(tiles),
            CHUNK=CHUNK,
            FEW=FEW,
            num_warps=CUT_WARPS,
            enable_fp_fusion=True,
        )
    return cuts, last_ties
