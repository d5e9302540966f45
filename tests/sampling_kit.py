"""Rows of sampling parameters for the tests of the device's sampling."""

from __future__ import annotations

from dataclasses import fields

import torch

from pd.kernels.sampling_device import DeviceSampling


def device_sampling(
    rows: int,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seed: int = 1,
    choice: int = 0,
    position: int = 0,
    device: str = "cpu",
) -> DeviceSampling:
    """`rows` draws at consecutive positions. A list is repeated over the rows."""

    def column(value: float | list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        values = value if isinstance(value, list) else [value]
        return torch.tensor([values[row % len(values)] for row in range(rows)], dtype=dtype, device=device)

    return DeviceSampling(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seed=column(seed, torch.int64),
        choice=column(choice, torch.int32),
        position=torch.arange(position, position + rows, dtype=torch.int32, device=device),
    )


def one_row(sampling: DeviceSampling, row: int) -> DeviceSampling:
    return DeviceSampling(*(getattr(sampling, field.name)[row : row + 1] for field in fields(sampling)))
