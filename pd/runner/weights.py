"""A model's tensors: read from a checkpoint (memory-mapped, converted, copied once into place), or random."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence

import torch
from safetensors import safe_open

from pd.errors import ModelError
from pd.models.checkpoint import Checkpoint


class CheckpointWeights:
    """`pd.models.registry.Weights` over safetensors files. The tensors it gives out are the caller's own memory.

    `progress(done, total)`, in bytes of the files, is called after each tensor. Close it (or leave the `with`) to unmap
    the files.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._progress = checkpoint, dtype, device, progress
        self._files: dict[str, safe_open] = {}
        self._done, self._total = 0, sum(entry.nbytes for entry in checkpoint.tensors.values())
        progress(0, self._total)

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return self.stack((name,), (shape,))

    def stack(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        rows = sum(shape[0] for shape in shapes)
        whole = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        begin = 0
        for name, shape in zip(names, shapes, strict=True):
            whole[begin : begin + shape[0]].copy_(self._mapped(name, shape))
            begin += shape[0]
            self._done += self._checkpoint.tensors[name].nbytes
            self._progress(self._done, self._total)
        return whole

    def _mapped(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        path = self._checkpoint.path
        entry = self._checkpoint.tensors.get(name)
        if entry is None:
            raise ModelError(path, f"tensor {name!r} is missing")
        if entry.shape != tuple(shape):
            raise ModelError(path, f"tensor {name!r} has shape {entry.shape} where {tuple(shape)} is needed")
        if entry.file not in self._files:
            self._files[entry.file] = safe_open(os.path.join(path, entry.file), framework="pt", device="cpu")
        tensor: torch.Tensor = self._files[entry.file].get_tensor(name)
        return tensor


class DummyWeights:
    """`pd.models.registry.Weights` that are in no file: random, of the usual size, and the same for the same names.

    So two instances have the same model. Norms (vectors) are about 1, everything else is normal with 0.02.
    `progress(done, 0)`, in bytes, is called after each tensor.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._dtype, self._device, self._progress = dtype, device, progress
        self._done = 0

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return self.stack((name,), (shape,))

    def stack(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> torch.Tensor:
        rows = sum(shape[0] for shape in shapes)
        whole = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        begin = 0
        for name, shape in zip(names, shapes, strict=True):
            generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
            vector = len(shape) == 1 and name.endswith("weight")
            whole[begin : begin + shape[0]].normal_(float(vector), 0.02, generator=generator)
            begin += shape[0]
        self._done += whole.nbytes
        self._progress(self._done, 0)
        return whole
