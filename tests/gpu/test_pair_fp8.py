"""Prefill and decode instance on one GPU with KV blocks of one byte an element, by CUDA IPC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_kit import Deployment, deploy

from tests.process import test_kv_fp8 as whole_path

DEVICE = "cuda"
SETTINGS = (*whole_path.FP8, "--max-total-tokens", "4096", "--cuda-graph-max-bs", "8")

_rested = whole_path._rested


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deploy(tmp_path_factory.mktemp("pair"), "qwen2", *SETTINGS, device=DEVICE) as found:
        yield found


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deploy(tmp_path_factory.mktemp("unified"), "qwen2", "--unified", "1", *SETTINGS, device=DEVICE) as found:
        yield found


test_bit_for_bit = whole_path.test_disaggregated_answers_are_those_of_one_instance_bit_for_bit
test_transformers = whole_path.test_they_are_what_transformers_computes_from_rounded_keys_and_values
test_prefixes = whole_path.test_behind_a_cached_prefix_and_where_decode_computes_the_prompt_itself_answers_agree
