"""Compiles kernels for sm_90 (Hopper) on a machine without a GPU, and looks at the machine code that comes out."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)

#: Shared memory that a block may have.
MAX_SHARED = 227 << 10


@dataclass(frozen=True)
class Compiled:
    """`sass` is the disassembly; `shared` in bytes; `metadata` is Triton's."""

    sass: str
    registers: int
    shared: int
    metadata: Any

    def count(self, instruction: str) -> int:
        """Occurrences of an instruction, by the whole of its name with modifiers or the part before a dot."""
        return len(re.findall(rf"\b{re.escape(instruction)}(?=[.\s])", self.sass))

    def check(self) -> None:
        """Nothing spills and the block fits."""
        assert self.count("LDL") == self.count("STL") == 0, "registers spill to local memory"
        assert self.shared <= MAX_SHARED


def compile_sm90(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """`signature` names the type of each argument that is no constexpr: "*i64", "i32", …; "*i64:16" is 16-byte aligned.

    An argument in `constexprs` needs no type; None there stands for a pointer that is not given.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    types = {name: "constexpr" if name in constexprs else signature[name].split(":")[0] for name in names}
    aligned = [name for name in names if signature.get(name, "").endswith(":16")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constexprs.items()}, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGET, options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _run(tools / "nvdisasm", cubin)
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Compiled(sass, int(registers[1]), compiled.metadata.shared, compiled.metadata)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
