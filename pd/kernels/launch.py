"""Options that kernels are launched with, and programmatic dependent launch (PDL).

Without PDL a kernel starts when the one before it in its stream has ended and its writes are visible: some microseconds
of every decode step pass between kernels. Launched with PDL it may start as soon as all programs of the one before it
have called `gdc_launch_dependents` or ended; its launch, its index arithmetic and its reads of weights then overlap
with that kernel's work. What keeps it correct is one instruction, `gdc_wait`, which returns when the kernel before it
has ended, all of it, and its writes are visible. So a kernel that is launched with `launch_options(..., pdl=True)`

- has a constexpr `PDL` and is, in outline:

      ...                                       # indices; reads of weights
      if PDL:
          tl.extra.cuda.gdc_launch_dependents()
          tl.extra.cuda.gdc_wait()
      ...                                       # everything else

- waits before it reads anything that a kernel of the step may have written, whichever it was (slots and tables that
  were brought to the device for this step included), and before it writes anything at all, for an earlier kernel may
  still read what was there. Only what no step writes, weights, may be read before;
- waits in *every* program, also in one that has nothing to do. The wait covers the kernel just before and no other:
  that all earlier ones have ended follows from that one having waited itself. If it had not, it could end, and let
  its dependent go on, while an older kernel still runs.

A kernel that is launched without PDL (cuBLAS', torch's, ours with pdl=False) starts after the end of all before it and
breaks no chain; after such a kernel the wait is for its end. Where `gdc_launch_dependents` stands decides only when
the next kernel may start, never what it sees. It may come first: dependents are scheduled only once all programs of
this kernel have started, so they take no room from them.

The guard is a constexpr because Triton's interpreter knows neither instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


@lru_cache
def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on this device can be launched with PDL: NVIDIA GPUs since Hopper, not the interpreter."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    import triton

    return torch.cuda.get_device_capability(device) >= (9, 0) and not triton.knobs.runtime.interpret


def columns(count: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`count` arrays of `length` values of four bytes, uninitialised, each at a multiple of 16 bytes.

    A kernel is compiled anew for a pointer that is not at one, in the middle of a step: so none may depend on a length.
    """
    return torch.empty(count, -(-length // 4) * 4, dtype=dtype, device=device)[:, :length].unbind()


def launch_options(num_warps: int, *, num_stages: int = 3, pdl: bool = False) -> dict[str, Any]:
    """Keyword arguments of a launch, for a kernel with the constexpr `PDL` of this module's description.

    One dictionary sets the constexpr and the launch's attribute, for the attribute without the wait would be a race.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, "PDL": pdl}
    if pdl:
        options["launch_pdl"] = True
    return options


def watch_compilation(told: Callable[[str], None]) -> None:
    """From now on `told` gets the name of each kernel that a launch had to compile first, in this process.

    A server that has warmed up should hear nothing: compiling takes a second or so, in which every request waits.
    """
    import triton

    def compiled(*, fn: Any, **_: object) -> None:
        told(fn.name)

    triton.knobs.runtime.jit_post_compile_hook = compiled
