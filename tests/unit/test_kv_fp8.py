"""KV blocks of one byte an element: what transformers computes from keys and values that are rounded so, everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pd.errors import ConfigError, ModelError
from pd.kernels.reference import as_bytes
from pd.messages import CopyBlock
from pd.models.info import check_model
from pd.transfer.digest import DigestGeometry, digest_blocks
from tests.oracle import Oracle, Scales, tiny_model
from tests.unit.test_worker_oracle import MODELS, assert_matches, prompt_of
from tests.worker_driver import KIND, Driver

#: Most by which a logprob may be off. A key that lies between two numbers of float8 is now and then rounded to the
#: other one, as sums are not added up in the same order.
TOLERANCE = 5e-3

PLAIN: tuple[Scales, ...] = ((1.0, 1.0),) * 3
SCALED: tuple[Scales, ...] = ((0.02, 0.013), (0.5, 1.0), (0.0078125, 0.3))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=["host", "device"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both workers; the GPU's computes with its kernels' references here."""
    token = KIND.set(request.param)
    yield request.param
    KIND.reset(token)


@pytest.fixture
def with_scales(folder: Path, tmp_path: Path) -> Callable[..., str]:
    """A copy of a tiny Llama with further tensors."""

    def make(tensors: dict[str, torch.Tensor]) -> str:
        path = tmp_path / "scaled"
        shutil.copytree(tiny_model(folder, "llama"), path, dirs_exist_ok=True)
        save_file(load_file(path / "model.safetensors") | tensors, path / "model.safetensors", {"format": "pt"})
        return str(path)

    return make


def scale_tensors(k: str, v: str, scales: tuple[Scales, ...] = SCALED, **kind: Any) -> dict[str, torch.Tensor]:
    named = {}
    for layer, pair in enumerate(scales):
        for name, scale in zip((k, v), pair, strict=True):
            named[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale], **kind)
    return named


def fp8(path: str, **options: Any) -> Driver:
    return Driver(path, kv_cache_dtype="fp8_e4m3", **options)


@pytest.mark.parametrize("name", ["llama", "tied-odd-heads", "mistral", "qwen2", "qwen3-window-biases", "one-kv-head"])
def test_models_compute_what_transformers_computes_from_rounded_keys_and_values(
    folder: Path, name: str, kind: str
) -> None:
    """Also the tokens of the prompt's own chunk are seen as the cache has them: chunks change nothing."""
    path = tiny_model(folder, **MODELS[name])
    driver = fp8(path)
    prompts = {1: prompt_of(70, 1), 2: prompt_of(9, 2)}
    for key, prompt in prompts.items():
        driver.admit(key, prompt, logprob_start=0)
    driver.generate(12, chunk=32)
    assert driver.pool.tensor.dtype == torch.float8_e4m3fn
    for key, prompt in prompts.items():
        assert_matches(Oracle(path, fp8_scales=PLAIN), driver.tracks[key], prompt, 12, TOLERANCE)


def test_that_is_close_to_what_unrounded_ones_give(folder: Path) -> None:
    """Of a model whose attention is sharper than trained ones' is: 0.17 of a logprob on average, root mean square."""
    path, prompt = tiny_model(folder, "llama"), prompt_of(200, 3)
    driver = fp8(path)
    track = driver.admit(1, prompt, logprob_start=0)
    driver.generate(1)
    exact = Oracle(path).logprobs(prompt)
    errors = [track.prompt_logprobs[at] - float(exact[at - 1, prompt[at]]) for at in range(1, 200)]
    assert 0.01 < np.square(errors).mean() ** 0.5 < 0.25


@pytest.mark.parametrize(
    "names",
    [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")],
    ids=["llm-compressor", "ModelOpt"],
)
def test_a_checkpoints_scales_are_divided_by_and_multiplied_with(
    with_scales: Callable[..., str], names: tuple[str, str], kind: str
) -> None:
    path, prompt = with_scales(scale_tensors(*names)), prompt_of(60)
    driver = fp8(path)
    assert driver.info.kv_scales == pytest.approx(np.array(SCALED), rel=1e-6)
    track = driver.admit(1, prompt, logprob_start=0)
    driver.generate(8, chunk=32)
    assert_matches(Oracle(path, fp8_scales=driver.info.kv_scales), track, prompt, 8, TOLERANCE)


def test_scales_of_other_types_and_one_for_both_are_read(with_scales: Callable[..., str]) -> None:
    narrow = scale_tensors("k_scale", "v_scale", ((0.5, 2.0),) * 3, dtype=torch.bfloat16)
    path = with_scales({name: value[0] for name, value in narrow.items()})
    info = check_model(path, kv_cache_dtype="fp8_e4m3", tokenizer=False)
    assert (info.kv_dtype, info.cache_dtype, info.kv_scales) == ("fp8_e4m3", "fp8_e4m3", ((0.5, 2.0),) * 3)
    both = {f"model.layers.{layer}.self_attn.kv_scale": torch.tensor(0.25).half() for layer in range(2)}
    info = check_model(with_scales(both), kv_cache_dtype="fp8_e4m3", tokenizer=False)
    assert info.kv_scales == ((0.25, 0.25), (0.25, 0.25), (1.0, 1.0))
    ones = with_scales(scale_tensors("k_scale", "v_scale", PLAIN))
    assert check_model(ones, kv_cache_dtype="fp8_e4m3", tokenizer=False).kv_scales == ()


def test_scales_are_of_no_use_to_a_cache_of_the_models_type(with_scales: Callable[..., str]) -> None:
    path, prompt = with_scales(scale_tensors("k_scale", "v_scale")), prompt_of(30)
    driver = Driver(path)
    assert (driver.info.kv_dtype, driver.info.cache_dtype, driver.info.kv_scales) == ("", "float32", ())
    track = driver.admit(1, prompt)
    driver.generate(5)
    assert track.emitted == Oracle(path).generate_logprobs(prompt, 5).tokens


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.tensor([0.0]), "no scale of keys or values"),
        (torch.tensor([float("nan")]), "no scale of keys or values"),
        (torch.tensor([-0.1]), "no scale of keys or values"),
        (torch.tensor([1e-40]), "no scale of keys or values"),
        (torch.ones(2), "where one number is needed"),
        (torch.ones(1, dtype=torch.int8), "has dtype I8"),
    ],
)
def test_what_is_no_scale_is_refused_by_name(
    with_scales: Callable[..., str], tensor: torch.Tensor, problem: str
) -> None:
    name = "model.layers.1.self_attn.k_scale"
    with pytest.raises(ModelError) as error:
        check_model(with_scales({name: tensor}), kv_cache_dtype="fp8_e4m3", tokenizer=False)
    assert problem in str(error.value) and repr(name) in str(error.value)


def test_heads_that_are_no_whole_words_are_refused_naming_the_flag(folder: Path) -> None:
    path = tiny_model(folder, "llama", head_dim=12)
    assert check_model(path, tokenizer=False).head_dim == 12
    with pytest.raises(ConfigError, match="--kv-cache-dtype: heads of 12 elements"):
        check_model(path, kv_cache_dtype="fp8_e4m3", tokenizer=False)


def test_a_block_has_a_quarter_of_the_bytes_of_float32(folder: Path) -> None:
    path = tiny_model(folder, "llama")
    assert fp8(path).shape.nbytes * 4 == Driver(path).shape.nbytes == 2 * 3 * 2 * 16 * 16 * 4


def test_a_cached_prefix_and_a_fresh_one_are_the_same(folder: Path, kind: str) -> None:
    """What a chunk attends to of itself is rounded, too."""
    path, prompt = tiny_model(folder, "llama"), prompt_of(57)
    whole, parted = fp8(path), fp8(path)
    first = whole.admit(1, prompt)
    whole.generate(6)
    parted.admit(1, prompt[:48])
    parted.generate(1)
    second = parted.admit(2, prompt, shared=parted.tracks[1].blocks[:3])
    parted.release(1)
    del parted.tracks[1]
    parted.generate(6)
    assert second.emitted == first.emitted
    assert second.logprobs == pytest.approx(first.logprobs, abs=TOLERANCE)


def test_a_handed_off_prompt_and_one_computed_again_go_on_alike(folder: Path, kind: str) -> None:
    """The bytes of the blocks are copied, digests of both sides agree, and a replay rounds to the same bytes."""
    path, prompt = tiny_model(folder, "llama"), prompt_of(37)
    prefill, decode, alone = fp8(path), fp8(path), fp8(path)
    track = prefill.admit(1, prompt)
    prefill.generate(1)
    blocks = [decode.free.pop() for _ in track.blocks]
    as_bytes(decode.pool.tensor)[blocks] = as_bytes(prefill.pool.tensor)[track.blocks]
    valid, geometry = np.array([16, 16, 5], dtype=np.int32), DigestGeometry(prefill.shape)
    sums = [
        digest_blocks(side.pool.bytes, side.shape.nbytes, np.array(ids, dtype=np.int32), valid, geometry)
        for side, ids in ((prefill, track.blocks), (decode, blocks))
    ]
    assert np.array_equal(*sums)
    there = decode.admit(1, prompt + track.emitted, prompt_len=37, shared=blocks, computed=37)
    decode.generate(7)
    once = alone.admit(1, prompt)
    alone.generate(8)
    assert track.emitted + there.emitted == once.emitted
    assert track.logprobs + there.logprobs == once.logprobs, "bit for bit"
    again = decode.admit(2, prompt + once.emitted[:4], prompt_len=37, epoch=2)
    decode.generate(4)
    assert again.emitted == once.emitted[4:]
    assert again.logprobs == pytest.approx(once.logprobs[4:], abs=TOLERANCE)


def test_a_partial_block_is_copied_with_its_bytes(folder: Path, kind: str) -> None:
    path, prompt = tiny_model(folder, "llama"), prompt_of(21)
    driver = fp8(path)
    first = driver.admit(1, prompt)
    driver.generate(1)
    copy = driver.free.pop()
    second = driver.admit(2, [*prompt, 77], prompt_len=21, shared=[first.blocks[0], copy], computed=21)
    driver.step({1: 1, 2: 1}, copies=[CopyBlock(first.blocks[1], copy, 5)])
    driver.generate(5)
    oracle = Oracle(path, fp8_scales=PLAIN)
    assert second.emitted == oracle.generate_logprobs([*prompt, 77], 5).tokens
    assert driver.pool.tensor[copy, ..., :5, :].float().isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models_take_it_as_well(folder: Path, dtype: str, kind: str) -> None:
    path, prompt = tiny_model(folder, "qwen2", dtype=dtype), prompt_of(40)
    driver = fp8(path)
    track = driver.admit(1, prompt, logprob_start=0)
    driver.generate(2, chunk=16)
    expected = Oracle(path, fp8_scales=PLAIN).logprobs(prompt)
    ours = np.array([track.prompt_logprobs[position] for position in range(1, 40)])
    theirs = expected[torch.arange(39), torch.tensor(prompt[1:])].numpy()
    assert np.abs(ours - theirs).mean() < (0.1 if dtype == "bfloat16" else 0.03)
