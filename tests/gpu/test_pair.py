"""A prefill and a decode instance on one GPU, KV over CUDA IPC: what the same cluster does on CPUs.

The tests are those of tests/process/test_end_to_end.py, with this file's clusters.
"""

from __future__ import annotations

from collections.abc import Iterator

import cluster_kit
import pytest
from cluster_kit import Deployment, ask, deploy, prompt

from tests.process import test_end_to_end as whole_path
from tests.replay import metrics

DEVICE, WAY = "cuda", "device"

#: Beside what the clusters on CPUs have: batches that are captured, and larger ones.
GRAPHS = ("--cuda-graph-max-bs", "8")

_everything_is_given_back = whole_path._everything_is_given_back


@pytest.fixture(autouse=True)
def _another_device_adds_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_kit, "NEAR", 1e-4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Qwen2 with little memory: eight long answers do not fit."""
    settings = (*whole_path.PAIR, "1024", *GRAPHS)
    with deploy(tmp_path_factory.mktemp("pair"), "qwen2", *settings, device=DEVICE) as found:
        yield found


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = ("--unified", "1", "--max-total-tokens", "16384", *GRAPHS)
    with deploy(tmp_path_factory.mktemp("unified"), "qwen2", *settings, device=DEVICE) as found:
        yield found


@pytest.fixture
def qwen2(pair: Deployment) -> Deployment:
    return pair


@pytest.fixture
def llama(pair: Deployment) -> Deployment:
    """The same one: a Llama with more memory there."""
    return pair


test_all_lengths = whole_path.test_tokens_and_logprobs_equal_transformers_for_a_batch_of_all_lengths
test_a_shared_prefix = whole_path.test_a_shared_prefix_is_exact_wherever_it_is_cached
test_prompt_logprobs = whole_path.test_prompt_logprobs_are_exact_although_the_prompt_is_cached_on_both_sides
test_retraction = whole_path.test_retraction_changes_no_token_and_no_logprob
test_a_chunk_lands_first = whole_path.test_a_chunk_has_landed_before_the_next_one_is_computed
test_sampling = whole_path.test_sampling_with_a_seed_is_the_same_alone_in_a_batch_and_on_one_instance
test_constraints = whole_path.test_constrained_outputs_match_and_are_the_same_on_one_instance
test_unified = whole_path.test_disaggregated_logprobs_equal_unified


def test_kv_went_from_device_to_device_and_every_digest_matched(pair: Deployment) -> None:
    with pair.moved() as moved:
        pair.generate([ask(prompt(100, 9000 + n), 4) for n in range(6)])
    assert moved["pushed"] == moved["landed"] == 6 * 7 * whole_path.BLOCK_BYTES
    assert {line["way"] for line in pair.running.logged("connected")} == {WAY}
    outcomes = {name: count for name, count in metrics(pair.decode).items() if name.startswith("pd_handoffs_total")}
    assert {name for name, count in outcomes.items() if count} == {'pd_handoffs_total{outcome="landed"}'}, outcomes
