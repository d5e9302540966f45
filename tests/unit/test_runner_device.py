"""What a runner computes on: choices by the machine, sizes of a GPU's pool, captured sizes, weights from nowhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pd.config import ModelConfig, SchedulerConfig, ServeConfig, for_device
from pd.errors import ConfigError
from pd.models.info import check_model
from pd.runner.config import RunnerConfig
from pd.runner.cuda_digest import PoolDigests
from pd.runner.device import Cpu, open_device, spins
from pd.runner.graphs import graph_sizes
from pd.runner.kv_pool import KvPool, allocate_region, count_device_blocks
from pd.runner.loading import load_model
from pd.runner.weights import DummyWeights
from pd.transfer.digest import DigestGeometry, digest_blocks
from pd.types import BlockShape
from tests.oracle import tiny_model
from tests.worker_driver import BUILDERS

SHAPE = BlockShape(tokens=16, kv_heads=2, layers=3, head_dim=8, itemsize=4)


def runner(**model: object) -> RunnerConfig:
    return RunnerConfig(role="unified", identity="x", step_endpoint="ipc://x", model=ModelConfig(**model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "accelerator", "expected"),
    [("auto", True, ("cuda", 8192, 8192)), ("auto", False, ("cpu", 512, 2048)), ("cpu", True, ("cpu", 512, 2048))],
)
def test_the_device_decides_what_a_step_takes(device: str, accelerator: bool, expected: tuple[str, int, int]) -> None:
    config = for_device(ServeConfig(model=ModelConfig(device=device)), accelerator)
    limits = config.scheduler
    assert (config.model.device, limits.chunked_prefill_size, limits.max_prefill_tokens) == expected


def test_what_is_set_stays() -> None:
    limits = SchedulerConfig(chunked_prefill_size=100, max_prefill_tokens=300)
    found = for_device(ServeConfig(scheduler=limits), True).scheduler
    assert (found.chunked_prefill_size, found.max_prefill_tokens) == (100, 300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_a_wrong_setting() -> None:
    assert isinstance(open_device(runner(device="auto")), Cpu)
    with pytest.raises(ConfigError, match="--device: cuda: torch finds no GPU here"):
        open_device(runner(device="cuda"))


def test_weights_and_pool_share_what_was_free() -> None:
    free, weights = 1000 * SHAPE.nbytes, 300 * SHAPE.nbytes

    def blocks(fraction: float, tokens: int = 0) -> int:
        return count_device_blocks(
            SHAPE, max_total_tokens=tokens, fraction=fraction, free_before=free, free_bytes=free - weights
        )

    assert blocks(0.5) == 200
    assert blocks(0.0) == 580, "0.88 of all, less the weights"
    assert blocks(0.5, tokens=160) == 11
    with pytest.raises(ConfigError, match="--mem-fraction-static"):
        blocks(0.3)
    with pytest.raises(ConfigError, match="--max-total-tokens"):
        blocks(0.5, tokens=16 * 701)


@pytest.mark.parametrize("largest", [1, 3, 8, 33, 256])
def test_captured_batches_reach_the_largest_and_waste_little(largest: int) -> None:
    sizes = graph_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest and sizes[0] == 1
    for rows in range(1, largest + 1):
        filled = next(size for size in sizes if size >= rows)
        assert filled - rows <= (3 if filled <= 32 else 15)


@pytest.mark.parametrize(
    ("wait", "cores", "gpus", "expected"),
    [
        ("auto", 16, 1, True),
        ("auto", 16, 8, False),
        ("auto", 4, 1, True),
        ("auto", 3, 1, False),
        ("spin", 1, 8, True),
        ("sleep", 64, 1, False),
    ],
)
def test_waiting_takes_a_core_only_where_there_are_enough(wait: str, cores: int, gpus: int, expected: bool) -> None:
    assert spins(wait, cores, gpus) is expected


def test_random_weights_are_the_same_everywhere_and_none_is_like_another() -> None:
    cpu = torch.device("cpu")
    one, other = DummyWeights(torch.float32, cpu), DummyWeights(torch.float32, cpu)
    fused = one.stack(("a.weight", "b.weight"), ((64, 32), (16, 32)))
    assert torch.equal(fused[:64], other.take("a.weight", (64, 32)))
    assert torch.equal(fused[64:], other.take("b.weight", (16, 32)))
    assert not torch.equal(fused[:16], fused[64:])
    assert abs(float(fused.std()) - 0.02) < 0.002
    norm = one.take("norm.weight", (4096,))
    assert abs(float(norm.mean()) - 1.0) < 0.01


def test_a_model_without_weights_is_loaded_with_random_ones(tmp_path: Path) -> None:
    path = tmp_path / "weightless"
    shutil.copytree(tiny_model(tmp_path, "llama"), path, ignore=shutil.ignore_patterns("*.safetensors*"))
    info = check_model(str(path), dummy=True, tokenizer=False)
    model = load_model(info, BUILDERS, dummy=True)
    again = load_model(info, BUILDERS, dummy=True)
    hidden = torch.randn(2, info.hidden_size)
    assert torch.equal(model.logits(hidden), again.logits(hidden))


def test_digests_of_blocks_are_the_hosts_whole_and_partial() -> None:
    pool = KvPool(allocate_region(9 * SHAPE.nbytes), SHAPE, 9, torch.float32)
    pool.tensor.normal_()
    blocks, tokens = np.array([3, 8, 1], dtype=np.int32), np.array([16, 5, 1], dtype=np.int32)
    geometry = DigestGeometry(SHAPE)
    expected = digest_blocks(pool.bytes, SHAPE.nbytes, blocks, tokens, geometry)
    found = PoolDigests(pool.memory, geometry)
    assert found(blocks, tokens).numpy().view(np.uint64).tolist() == expected.tolist()
    assert found(blocks[:1], tokens[:1]).numpy().view(np.uint64).tolist() == expected[:1].tolist()
