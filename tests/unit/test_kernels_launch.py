"""What kernels are launched with."""

from __future__ import annotations

import torch

from pd.kernels.launch import launch_options, pdl_supported


def test_a_kernel_is_launched_as_a_dependent_only_if_it_also_waits() -> None:
    assert launch_options(8) == {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, "PDL": False}
    options = launch_options(4, num_stages=2, pdl=True)
    assert options["PDL"] and options["launch_pdl"] and (options["num_warps"], options["num_stages"]) == (4, 2)


def test_dependent_launches_need_a_gpu() -> None:
    assert not pdl_supported(torch.device("cpu"))
