"""Projections of few rows: kernels whose time is that of reading the weight once."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pd.kernels.linear_configs import Config, Row, Stream

#: Programs that may divide blocks of rows among them: each has a counter.
MOST_PROGRAMS = 8192

#: Sums that are turned round in shared memory at once, on their way to where they are stored.
AT_ONCE = tl.constexpr(4096)

#: What stands for the multiprocessors of a GPU in the interpreter.
INTERPRETED_PROCESSORS = 3


@triton.jit
def _prefetch_lines(pointers):
    """Ask for the lines of 128 bytes at `pointers` to be brought into the L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_tile(weight, row, column, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    LINE: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(row + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
    columns = tl.minimum(column + tl.arange(0, BLOCK_K // LINE) * LINE, k - 1)
    _prefetch_lines(weight + rows[:, None] * k + columns[None, :])


@triton.jit
def _load_tile(weight, row, column, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """weight [n, k] at (row, column) -> [BLOCK_N, BLOCK_K]; zeros outside. Read once: the L2 need not keep it."""
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    start = weight + row.to(tl.int64) * k + column
    pointers = start + rows[:, None] * k + columns[None, :]
    if EVEN:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        mask = (row + rows < n)[:, None] & (column + columns < k)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _load_x(x, column, rows, k, x_stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    """x [rows, k] from `column` on -> [ROWS, BLOCK_K]; zeros outside."""
    lanes = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_K)
    pointers = x + column + lanes[:, None] * x_stride + columns[None, :]
    mask = (lanes < rows)[:, None]
    if not EVEN:
        mask = mask & (column + columns < k)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def _halves(sums, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N, WIDTH] -> the left and the right columns. A thread has the same ones of both, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(sums, [BLOCK_N, 2, WIDTH // 2]), (0, 2, 1)))


@triton.jit
def _store(out, bias, sums, row, lane, rows, n, out_stride, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums [BLOCK_N, WIDTH] float32 -> out [rows, n], from (lane, row) on."""
    if WIDTH * BLOCK_N > AT_ONCE:
        left, right = _halves(sums, WIDTH, BLOCK_N)
        _store(out, bias, left, row, lane, rows, n, out_stride, WIDTH // 2, BLOCK_N)
        _store(out, bias, right, row, lane + WIDTH // 2, rows, n, out_stride, WIDTH // 2, BLOCK_N)
    else:
        columns = row + tl.arange(0, BLOCK_N)
        lanes = lane + tl.arange(0, WIDTH)
        if bias is not None:
            sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
        pointers = out + lanes[:, None] * out_stride + columns[None, :]
        mask = (lanes < rows)[:, None] & (columns < n)[None, :]
        tl.store(pointers, tl.trans(sums).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _places(WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.arange(0, BLOCK_N)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _keep(part, sums, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave partial sums [BLOCK_N, WIDTH] at `part`, halves of halves one after the other."""
    if WIDTH * BLOCK_N > AT_ONCE:
        left, right = _halves(sums, WIDTH, BLOCK_N)
        _keep(part, left, WIDTH // 2, BLOCK_N)
        _keep(part + BLOCK_N * (WIDTH // 2), right, WIDTH // 2, BLOCK_N)
    else:
        tl.store(part + _places(WIDTH, BLOCK_N), sums, cache_modifier=".cg")


@triton.jit
def _add_up(
    out, bias, partial, first, last, row, lane, rows, n, out_stride,
    SLOT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the sum of what programs first to last kept, each in slots of SLOT numbers."""
    if WIDTH * BLOCK_N > AT_ONCE:
        HALF: tl.constexpr = WIDTH // 2
        right = partial + BLOCK_N * HALF
        _add_up(out, bias, partial, first, last, row, lane, rows, n, out_stride, SLOT, HALF, BLOCK_N)
        _add_up(out, bias, right, first, last, row, lane + HALF, rows, n, out_stride, SLOT, HALF, BLOCK_N)
    else:
        places = _places(WIDTH, BLOCK_N)
        sums = tl.zeros([BLOCK_N, WIDTH], tl.float32)
        for program in range(first, last + 1):
            # A program keeps the block that it ends in its first slot, the one that it leaves unfinished in its second.
            slot = 2 * program + (program != last).to(tl.int32)
            sums += tl.load(partial + slot * SLOT + places, cache_modifier=".cg")
        _store(out, bias, sums, row, lane, rows, n, out_stride, WIDTH, BLOCK_N)


@triton.jit
def _begin_of(program, total, programs):
    return (program.to(tl.int64) * total // programs).to(tl.int32)


@triton.jit
def _owner(step, total, programs):
    """The program whose share of `total` steps has `step`."""
    return (((step + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)


@triton.jit
def _arrive(
    block, out, bias, partial, arrivals, rows, n, out_stride, steps, total, programs,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Say that this program's part of a divided block of rows is there; the last to say so adds all parts and stores.

    The order of the sum is that of the programs, so that the result does not depend on who is last.
    """
    first = _owner(block * steps, total, programs)
    last = _owner(block * steps + steps - 1, total, programs)
    before = tl.atomic_add(arrivals + first, 1, sem="acq_rel", scope="gpu")
    if before == last - first:
        tl.store(arrivals + first, 0)  # for the next launch
        row = block * BLOCK_N
        _add_up(out, bias, partial, first, last, row, 0, rows, n, out_stride, BLOCK_N * ROWS, ROWS, BLOCK_N)


@triton.jit(do_not_specialize=["rows", "prefetch"])
def stream(
    x, weight, x_tiles, weight_tiles, bias, out, partial, arrivals, rows, n, k, x_stride, out_stride, prefetch,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, DIVIDED: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [rows, k] @ weight[n, k]^T + bias -> out [rows, n].

    All blocks of BLOCK_N rows of the weight by all steps of BLOCK_K along k are one sequence, cut into as many equal
    runs as there are programs ("stream-K", https://arxiv.org/abs/2301.03598). The weight is the wide operand of the
    matrix unit, x^T (rows padded to ROWS) the narrow one. A block that lies in one run is stored at once; of a DIVIDED
    one every program keeps its part in `partial` float32[2 programs, BLOCK_N, ROWS] and counts itself in
    `arrivals` int32[programs], which are zeros before and after. Tiles come through the descriptors if there are some.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = tl.cdiv(k, BLOCK_K)
    total = tl.cdiv(n, BLOCK_N) * steps
    begin = _begin_of(program, total, programs)
    end = _begin_of(program + 1, total, programs)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        for step in range(begin, tl.minimum(begin + prefetch, end)):
            row = step // steps * BLOCK_N
            _prefetch_tile(weight, row, step % steps * BLOCK_K, n, k, BLOCK_N, BLOCK_K)
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in tl.range(begin, end):
        row = step // steps * BLOCK_N
        column = step % steps * BLOCK_K
        if weight_tiles is not None:
            w = weight_tiles.load([row, column])
            xs = x_tiles.load([0, column])
        else:
            w = _load_tile(weight, row, column, n, k, BLOCK_N, BLOCK_K, EVEN)
            xs = _load_x(x, column, rows, k, x_stride, ROWS, BLOCK_K, EVEN)
        sums = tl.dot(w, xs.T, sums)
        if step % steps == steps - 1:
            if DIVIDED:
                if step - steps + 1 >= begin:
                    _store(out, bias, sums, row, 0, rows, n, out_stride, ROWS, BLOCK_N)
                else:
                    _keep(partial + 2 * program * (BLOCK_N * ROWS), sums, ROWS, BLOCK_N)
            else:
                _store(out, bias, sums, row, 0, rows, n, out_stride, ROWS, BLOCK_N)
            sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if PDL:
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    if DIVIDED:
        unfinished = end % steps != 0
        if unfinished:
            _keep(partial + (2 * program + 1) * (BLOCK_N * ROWS), sums, ROWS, BLOCK_N)
        tl.debug_barrier()  # every thread's parts are written before one thread counts them
        if (begin % steps != 0) & (begin // steps != end // steps):
            block = begin // steps
            _arrive(block, out, bias, partial, arrivals, rows, n, out_stride, steps, total, programs, ROWS, BLOCK_N)
        if unfinished:
            block = end // steps
            _arrive(block, out, bias, partial, arrivals, rows, n, out_stride, steps, total, programs, ROWS, BLOCK_N)


@triton.jit
def row(
    x, weight, bias, out, n,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`stream` for a single row of x: each program has BLOCK_N rows of the weight, in registers, one step ahead."""
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0) * BLOCK_N
    columns = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    w = _load_tile(weight, first, 0, n, K, BLOCK_N, BLOCK_K, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for column in tl.static_range(0, K, BLOCK_K):
        next_w = w
        if column + BLOCK_K < K:
            next_w = _load_tile(weight, first, column + BLOCK_K, n, K, BLOCK_N, BLOCK_K, EVEN)
        xs = tl.load(x + column + columns, mask=column + columns < K, other=0.0, eviction_policy="evict_last")
        sums += w.to(tl.float32) * xs.to(tl.float32)[None, :]
        w = next_w
    if PDL:
        if not EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    lines = first + tl.arange(0, BLOCK_N)
    inside = lines < n
    result = tl.sum(sums, 1)
    if bias is not None:
        result += tl.load(bias + lines, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + lines, result.to(out.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: Config) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] or None -> [T, N].

    x may have any row stride. The weight is contiguous, K a multiple of 16.
    """
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if isinstance(config, Row):
            _launch_row(x, weight, bias, out, config)
        else:
            _launch_stream(x, weight, bias, out, config)
    return out


def _launch_row(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: Row
) -> None:
    n, k = weight.shape
    row[(triton.cdiv(n, config.block_n),)](
        x, weight, bias, out, n,
        K=k, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        EVEN=n % config.block_n == 0 and k % config.block_k == 0, PDL=config.pdl, EARLY=config.early,
        num_warps=config.warps, **options(config.pdl),
    )  # fmt: skip


def _launch_stream(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, config: Stream
) -> None:
    rows, (n, k) = x.shape[0], weight.shape
    padded = max(16, triton.next_power_of_2(rows))
    programs, divided = shares(config, n, k, _processors(x.device))
    partial = arrivals = x_tiles = weight_tiles = None
    if divided:
        partial = torch.empty(2 * programs, config.block_n, padded, dtype=torch.float32, device=x.device)
        arrivals = _arrivals_here(x.device)
    if config.tma:
        x_tiles = TensorDescriptor(x, [rows, k], list(x.stride()), [padded, config.block_k])
        weight_tiles = TensorDescriptor(weight, [n, k], [k, 1], [config.block_n, config.block_k])
    stream[(programs,)](
        x, weight, x_tiles, weight_tiles, bias, out, partial, arrivals, rows, n, k, x.stride(0), out.stride(0),
        config.prefetch,
        ROWS=padded, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        EVEN=n % config.block_n == 0 and k % config.block_k == 0, DIVIDED=divided,
        PDL=config.pdl, EARLY=config.early,
        num_warps=config.warps, num_stages=config.stages, **options(config.pdl),
    )  # fmt: skip


def options(pdl: bool) -> dict[str, Any]:
    """Without it the option is left out: the interpreter has none."""
    return {"enable_fp_fusion": True} | ({"launch_pdl": True} if pdl else {})


def shares(config: Stream, n: int, k: int, processors: int) -> tuple[int, bool]:
    """Programs, and whether any block of rows is divided between some."""
    blocks, steps = triton.cdiv(n, config.block_n), triton.cdiv(k, config.block_k)
    programs = config.per_sm * processors if config.per_sm else blocks * config.split
    programs = min(programs, blocks * steps)
    divided = blocks % programs != 0
    if divided and programs > MOST_PROGRAMS:
        raise ValueError(f"{programs} programs are more than {MOST_PROGRAMS}")
    return programs, divided


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _arrivals(device: torch.device, stream: int | None) -> torch.Tensor:
    return torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)


def _arrivals_here(device: torch.device) -> torch.Tensor:
    """The counters of the current stream, or of all CUDA graphs: launches that share counters must not overlap.

    Zeros are made outside of graphs, so the first launch on a device must not be captured: RuntimeError.
    """
    if device.type != "cuda":
        return _arrivals(device, None)
    if torch.cuda.is_current_stream_capturing():
        if not _arrivals.cache_info().currsize:
            raise RuntimeError("run the projection once before it is captured in a CUDA graph")
        return _arrivals(device, None)
    _arrivals(device, None)
    return _arrivals(device, torch.cuda.current_stream(device).cuda_stream)
