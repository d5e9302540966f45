"""What of CUDA IPC can be told without a GPU: handles, and the tensors over what they map."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from pd.errors import TransferError
from pd.runner.cuda_ipc import CudaMapping, _check, _Span, _table_start

CPU = torch.device("cpu")


class FakeRuntime:
    """A handle holds the address that it maps to."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.forgotten = 0
        self.open: list[int] = []

    def cudaIpcOpenMemHandle(self, base: Any, handle: ctypes.Structure, flags: ctypes.c_uint) -> int:
        assert flags.value == 1, "peers are enabled when they are needed"
        if not self.code:
            base._obj.value = int.from_bytes(bytes(handle)[:8], "little")
            self.open.append(base._obj.value)
        return self.code

    def cudaGetLastError(self) -> None:
        self.forgotten += 1


def handle(address: int) -> bytes:
    return address.to_bytes(8, "little") + bytes(56)


def test_mapped_memory_is_seen_as_words_of_the_device_here() -> None:
    raw = np.arange(64, dtype=np.uint8)
    runtime = FakeRuntime()
    mapping = CudaMapping(CPU, runtime, False)  # type: ignore[arg-type]
    mapping.add(_Span(handle(raw.ctypes.data), 16, 24))
    mapping.add(_Span(handle(raw.ctypes.data), 0, 64))
    assert [one.numel() for one in mapping.words] == [3, 8] and mapping.words[0].device == CPU
    assert mapping.words[0].numpy().tobytes() == raw[16:40].tobytes()
    raw[16] = 255
    assert int(mapping.words[0][0]) & 255 == 255, "no copy"
    assert runtime.open == [raw.ctypes.data] * 2


@pytest.mark.parametrize(
    "span",
    [
        _Span(b"", 0, 8),
        _Span(bytes(65), 0, 8),
        _Span(handle(64), -8, 8),
        _Span(handle(64), 1 << 60, 8),
        _Span(handle(64), 0, 0),
    ],
)
def test_what_is_no_handle_is_refused(span: _Span) -> None:
    with pytest.raises(TransferError, match="not a handle"):
        CudaMapping(CPU, FakeRuntime(), False).add(span)  # type: ignore[arg-type]


def test_a_failed_call_names_itself_and_leaves_no_error_for_torch() -> None:
    runtime = FakeRuntime(code=201)
    with pytest.raises(TransferError, match="cudaIpcOpenMemHandle failed with CUDA error 201"):
        CudaMapping(CPU, runtime, False).add(_Span(handle(64), 0, 8))  # type: ignore[arg-type]
    assert runtime.forgotten == 1
    _check(runtime, 0, "anything")  # type: ignore[arg-type]


def test_a_table_begins_at_16_bytes() -> None:
    assert [_table_start(count) for count in range(5)] == [0, 2, 2, 4, 4]
