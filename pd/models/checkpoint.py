"""Safetensors files read as metadata only: names, dtypes, shapes and places. No torch, no tensor is read.

File format: https://github.com/huggingface/safetensors#format (uint64 length, JSON header, tensor bytes).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from pd.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20
_FORMATS = {"F64": "d", "F32": "f", "F16": "e"}
_ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: its file, safetensors dtype ("F32", …), shape and place in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """0 of a dtype that is not known here."""
        return math.prod(self.shape) * _ITEMSIZE.get(self.dtype, 0)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model directory by name, and the raw header and size of each file for fingerprints."""

    path: str
    tensors: dict[str, TensorEntry]
    files: dict[str, tuple[bytes, int]]  # file name -> (header bytes, file size)


def read_json(path: str, name: str) -> dict[str, object]:
    """A JSON object in a model directory. Raises ModelError when it is missing or no object."""
    try:
        with open(os.path.join(path, name), "rb") as file:
            value = msgspec.json.decode(file.read())
    except FileNotFoundError:
        raise ModelError(path, f"{name} is missing") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(path, f"{name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(path, f"{name} must hold a JSON object")
    return value


def read_checkpoint(path: str) -> Checkpoint:
    """Headers of `model.safetensors`, or of every shard that the index names. Raises ModelError."""
    if os.path.exists(os.path.join(path, SINGLE)):
        mapping, names = {}, [SINGLE]
    elif os.path.exists(os.path.join(path, INDEX)):
        mapping = _weight_map(path)
        names = sorted(set(mapping.values()))
    else:
        raise ModelError(path, f"no weights: neither {SINGLE} nor {INDEX} (other weight formats are not read)")
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, tuple[bytes, int]] = {}
    for name in names:
        header, size = _read_header(path, name)
        files[name] = (header, size)
        for tensor, entry in _entries(path, name, header, size):
            if mapping.get(tensor, name) == name:
                tensors[tensor] = entry
    for tensor, name in mapping.items():
        if tensor not in tensors:
            raise ModelError(path, f"{INDEX} names {tensor!r}, but its shard {name!r} does not hold it")
    return Checkpoint(path, tensors, files)


def read_number(checkpoint: Checkpoint, name: str) -> float:
    """A tensor of a single number. Raises ModelError for any other."""
    entry = checkpoint.tensors[name]
    if math.prod(entry.shape) != 1:
        raise ModelError(checkpoint.path, f"tensor {name!r} has shape {entry.shape} where one number is needed")
    with open(os.path.join(checkpoint.path, entry.file), "rb") as file:
        file.seek(entry.begin)
        data = file.read(entry.end - entry.begin)
    if entry.dtype == "BF16":
        data, kind = b"\0\0" + data, "f"
    elif entry.dtype in _FORMATS:
        kind = _FORMATS[entry.dtype]
    else:
        raise ModelError(checkpoint.path, f"tensor {name!r} has dtype {entry.dtype}, which is not supported")
    (number,) = struct.unpack("<" + kind, data)
    return float(number)


def shards(path: str) -> list[str]:
    """The files that the index names. Raises ModelError."""
    return sorted(set(_weight_map(path).values()))


def _weight_map(path: str) -> dict[str, str]:
    mapping = read_json(path, INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ModelError(path, f"{INDEX} has no weight_map")
    for name in mapping.values():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ModelError(path, f"{INDEX} names a shard outside the directory: {name!r}")
    return mapping


def _read_header(path: str, name: str) -> tuple[bytes, int]:
    try:
        with open(os.path.join(path, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ModelError(path, f"{name} is no safetensors file, or its header is cut off")
            return file.read(length), size
    except FileNotFoundError:
        raise ModelError(path, f"shard {name} is missing") from None
    except OSError as error:
        raise ModelError(path, f"{name} cannot be read: {error}") from error


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _entries(path: str, name: str, header: bytes, size: int) -> Iterator[tuple[str, TensorEntry]]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        decoder = msgspec.json.Decoder(_HeaderEntry)
        entries = {tensor: decoder.decode(value) for tensor, value in raw.items()}
    except msgspec.DecodeError as error:
        raise ModelError(path, f"{name} has a damaged header: {error}") from error
    room = size - 8 - len(header)
    for tensor, entry in entries.items():
        begin, end = entry.data_offsets
        expected = math.prod(entry.shape) * _ITEMSIZE.get(entry.dtype, 0)
        if not 0 <= begin <= end <= room:
            raise ModelError(path, f"{name} is cut off: {tensor!r} ends at byte {end} of {room}")
        if expected and end - begin != expected:
            raise ModelError(path, f"{name}: {tensor!r} has {end - begin} bytes where its shape needs {expected}")
        start = 8 + len(header)
        yield tensor, TensorEntry(name, entry.dtype, tuple(entry.shape), start + begin, start + end)
