"""The runner's worker against transformers (float32, eager): tokens and logprobs, whatever the order's shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pd.errors import ProtocolError
from pd.messages import Admit, CopyBlock, Push, StepOrder
from pd.types import SamplingParams
from tests.oracle import Oracle, tiny_model
from tests.worker_driver import GREEDY, KIND, Driver, Track, f32, i32

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOWED = {"arch": "mistral", "sliding_window": 24}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "qwen2": {"arch": "qwen2"},
    "llama3-rope": {"arch": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama3-rope-older-config": {"arch": "llama", "rope_parameters": LLAMA3_ROPE, "older_config": True},
    "linear-rope": {"arch": "llama", "rope_parameters": LINEAR_ROPE},
    "tied-odd-heads": {"arch": "llama", "tie_word_embeddings": True, "head_dim": 24, "num_attention_heads": 8},
    "qwen2-tied-sharded-older-config": {
        "arch": "qwen2",
        "tie_word_embeddings": True,
        "shards": 3,
        "older_config": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "biases-everywhere": {"arch": "llama", "attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"arch": "llama", "num_key_value_heads": 1},
    "no-grouping": {"arch": "qwen2", "num_key_value_heads": 4},
    "mistral": WINDOWED,
    "mistral-older-config": {**WINDOWED, "older_config": True},
    "mistral-without-window": {"arch": "mistral", "sliding_window": None, "head_dim": 32},
    "mistral-own-token-only": {"arch": "mistral", "sliding_window": 1},
    "mistral-some-layers": {**WINDOWED, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "qwen2-window": {"arch": "qwen2", **QWEN_WINDOW},
    "qwen2-window-older-config": {"arch": "qwen2", **QWEN_WINDOW, "older_config": True},
    "qwen2-window-unused": {"arch": "qwen2", "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    "qwen3": {"arch": "qwen3", "head_dim": 32},
    "qwen3-tied-sharded-older-config": {
        "arch": "qwen3",
        "head_dim": 24,
        "tie_word_embeddings": True,
        "shards": 2,
        "older_config": True,
    },
    "qwen3-window-biases": {"arch": "qwen3", "head_dim": 16, "attention_bias": True, **QWEN_WINDOW},
    "yarn": {"arch": "llama", "rope_parameters": YARN},
    "yarn-older-config": {"arch": "qwen2", "rope_parameters": YARN, "older_config": True},
    "yarn-own-attention-factor": {"arch": "qwen3", "rope_parameters": {**YARN, "attention_factor": 1.3}},
    "yarn-mscale": {"arch": "llama", "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}},
    "yarn-betas": {
        "arch": "mistral",
        "sliding_window": None,
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 512,
            "beta_fast": 8,
            "beta_slow": 2,
            "truncate": False,
        },
    },
    "yarn-of-one-frequency": {"arch": "llama", "rope_parameters": {**YARN, "beta_fast": 2.5, "beta_slow": 2.5}},
    "yarn-factor-from-lengths": {"arch": "llama", "rope_parameters": {**YARN, "factor": None}},
    "dynamic-ntk": {"arch": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=["host", "device"], autouse=True)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both workers; the GPU's computes with its kernels' references here."""
    token = KIND.set(request.param)
    yield request.param
    KIND.reset(token)


@pytest.fixture
def llama(folder: Path) -> str:
    return tiny_model(folder, "llama")


@pytest.fixture(params=["llama", "windowed"])
def model(folder: Path, request: pytest.FixtureRequest) -> str:
    """Attention to everything, and to less than what most prompts here have."""
    return tiny_model(folder, **(WINDOWED if request.param == "windowed" else {"arch": "llama"}))


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


def assert_matches(oracle: Oracle, track: Track, prompt: list[int], n: int, tolerance: float = 1e-5) -> None:
    """`n` tokens and their logprobs, and the prompt's where asked for."""
    expected = oracle.generate_logprobs(prompt, n)
    assert track.emitted == expected.tokens
    chosen = [float(expected.logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(expected.tokens)]
    assert track.logprobs == pytest.approx(chosen, abs=tolerance)
    for position, value in track.prompt_logprobs.items():
        if position:
            assert value == pytest.approx(float(expected.logprobs[position - 1, prompt[position]]), abs=tolerance)
        else:
            assert np.isnan(value)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_computes_what_transformers_computes(folder: Path, name: str) -> None:
    path = tiny_model(folder, **MODELS[name])
    driver = Driver(path)
    prompts = {1: prompt_of(70, 1), 2: prompt_of(9, 2)}
    for key, prompt in prompts.items():
        driver.admit(key, prompt, logprob_start=0)
    driver.generate(12, chunk=32)
    for key, prompt in prompts.items():
        assert set(driver.tracks[key].prompt_logprobs) == set(range(len(prompt)))
        assert_matches(Oracle(path), driver.tracks[key], prompt, 12)


@pytest.mark.parametrize("name", ["llama", "tied-odd-heads", "mistral", "qwen3", "biases-everywhere", "qwen2"])
def test_folded_and_deferred_norms_change_no_result(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in bfloat16: prompts are computed with deferred norms, decode steps with folded ones."""
    monkeypatch.setattr("pd.models.llama.FOLDED_DTYPE", torch.float32)
    monkeypatch.setattr("pd.models.llama.DEFERRED_TOKENS", 4)
    path, prompt = tiny_model(folder, **MODELS[name]), prompt_of(70)
    driver = Driver(path)
    track = driver.admit(1, prompt, logprob_start=0)
    driver.generate(12, chunk=32)
    assert_matches(Oracle(path), track, prompt, 12, tolerance=3e-5)


@pytest.mark.parametrize("page_size", [4, 16, 32])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_neither_page_size_nor_chunks_change_a_result(model: str, page_size: int, chunk: int) -> None:
    driver = Driver(model, page_size=page_size)
    prompt = prompt_of(45)
    track = driver.admit(1, prompt, logprob_start=3)
    driver.generate(8, chunk=chunk)
    assert set(track.prompt_logprobs) == set(range(3, 45))
    assert_matches(Oracle(model), track, prompt, 8)


def test_a_long_prompt_stays_within_its_tolerance(model: str) -> None:
    driver = Driver(model, page_size=32)
    prompt = prompt_of(600)
    track = driver.admit(1, prompt, logprob_start=0)
    driver.generate(3, chunk=256)
    assert_matches(Oracle(model), track, prompt, 3, tolerance=1e-4)


def test_prompts_and_decodes_of_many_requests_share_a_step(model: str) -> None:
    """Requests arrive while others decode; contexts differ by an order of magnitude, so decode rows form groups."""
    driver = Driver(model, page_size=4, num_blocks=600)
    lengths = [3, 150, 8, 17, 1, 64, 33, 90]
    prompts = {key: prompt_of(length, key) for key, length in enumerate(lengths)}
    waiting = list(prompts)
    while waiting or any(len(track.emitted) < 10 for track in driver.tracks.values()):
        if waiting:
            driver.admit(waiting[0], prompts[waiting.pop(0)])
        live = [track for track in driver.tracks.values() if len(track.emitted) < 10]
        driver.step({track.key: min(40, len(track.tokens) - track.computed) for track in live})
    for key, prompt in prompts.items():
        assert_matches(Oracle(model), driver.tracks[key], prompt, 10)


def test_a_shared_prefix_is_read_and_not_computed_again(model: str) -> None:
    driver = Driver(model, page_size=16)
    prefix = prompt_of(48)
    first = driver.admit(1, prefix + prompt_of(5, 8))
    driver.generate(4)
    before = driver.pool.tensor[first.blocks[:3]].clone()
    tail = prompt_of(9, 9)
    second = driver.admit(2, prefix + tail, shared=first.blocks[:3])
    assert second.computed == 48
    driver.step({1: 1, 2: 9})
    driver.generate(6)
    assert torch.equal(before, driver.pool.tensor[first.blocks[:3]])
    assert_matches(Oracle(model), second, prefix + tail, 6)


def test_a_replay_continues_where_the_emitted_tokens_end(model: str) -> None:
    prompt = prompt_of(20)
    once = Driver(model)
    once.admit(1, prompt)
    once.generate(10)
    again = Driver(model)
    track = again.admit(1, prompt + once.tracks[1].emitted[:6], prompt_len=20, epoch=2)
    again.generate(4)
    assert track.emitted == once.tracks[1].emitted[6:]
    assert track.logprobs == pytest.approx(once.tracks[1].logprobs[6:], abs=1e-5)


def test_a_decode_instance_continues_from_blocks_it_did_not_compute(model: str) -> None:
    """What a hand-off does: blocks copied between pools, admitted with the first token known."""
    prompt = prompt_of(37)
    prefill, decode = Driver(model), Driver(model)
    track = prefill.admit(1, prompt)
    prefill.generate(1)
    blocks = [decode.free.pop() for _ in track.blocks]
    decode.pool.tensor[blocks] = prefill.pool.tensor[track.blocks]
    there = decode.admit(1, prompt + track.emitted, prompt_len=37, shared=blocks, computed=37)
    decode.generate(7)
    expected = Oracle(model).generate_logprobs(prompt, 8)
    assert track.emitted + there.emitted == expected.tokens


def test_a_partial_block_is_copied_for_another_choice(model: str) -> None:
    driver = Driver(model, page_size=16)
    prompt = prompt_of(21)
    first = driver.admit(1, prompt)
    driver.generate(1)
    copy = driver.free.pop()
    second = driver.admit(2, [*prompt, 77], prompt_len=21, shared=[first.blocks[0], copy], computed=21)
    driver.step({1: 1, 2: 1}, copies=[CopyBlock(first.blocks[1], copy, 5)])
    driver.generate(5)
    expected = Oracle(model).generate_logprobs([*prompt, 77], 5)
    assert second.emitted == expected.tokens
    assert_matches(Oracle(model), first, prompt, 5)
    assert driver.pool.tensor[copy, ..., :5, :].isfinite().all()


def test_orders_may_be_made_before_the_tokens_of_the_last_step_are_known(llama: str) -> None:
    driver = Driver(llama)
    prompt = prompt_of(30)
    track = driver.admit(1, prompt)
    orders = [driver.order({1: 30})] + [driver.order({1: 1}) for _ in range(9)]
    for order in orders:
        driver.run(order)
    assert_matches(Oracle(llama), track, prompt, 10)


def test_a_surplus_row_beyond_its_blocks_writes_to_the_scratch_block_only(llama: str) -> None:
    driver = Driver(llama, page_size=4)
    prompt = prompt_of(8)
    track = driver.admit(1, prompt)
    driver.generate(1)
    held = driver.pool.tensor[1:].clone()
    order = driver.order({1: 1})
    order.grow_keys_i64 = order.grow_blocks_i32 = b""
    done = driver.run(order)
    assert len(track.blocks) == 3 and done.counts_u8 == b"\1"
    assert torch.equal(held.nan_to_num(9.0), driver.pool.tensor[1:].nan_to_num(9.0))
    assert driver.pool.tensor[0, :, :, :, 0].isfinite().all()


def test_a_key_may_be_released_and_admitted_again_in_one_order(llama: str) -> None:
    driver = Driver(llama)
    driver.admit(1, prompt_of(12, 3))
    driver.generate(3)
    driver.release(1)
    track = driver.admit(1, prompt_of(15, 4), epoch=2)
    driver.generate(5)
    assert_matches(Oracle(llama), track, prompt_of(15, 4), 5)


def test_alternatives_and_wanted_ids_are_the_oracles(llama: str) -> None:
    driver = Driver(llama)
    prompt = prompt_of(25)
    sampling = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=4, token_ids_logprob=(5, 250, 999))
    driver.admit(1, prompt, sampling, logprob_start=20, prompt_top_logprobs=3)
    done = driver.step({1: 25})
    expected = Oracle(llama).logprobs(prompt)
    tops = done.logprobs[0].logprobs.tops
    assert tops is not None and tops.width == 4
    best = expected[24].topk(4)
    assert np.frombuffer(tops.ids_i32, np.int32).tolist() == best.indices.tolist()
    assert f32(tops.logprobs_f32) == pytest.approx(best.values.numpy(), abs=1e-5)
    wanted = f32(done.logprobs[0].logprobs.wanted_f32)
    assert wanted[:2] == pytest.approx(expected[24, [5, 250]].numpy(), abs=1e-5) and np.isnan(wanted[2])
    prompt_part = done.prompt_logprobs[0].logprobs
    assert prompt_part.start == 20 and prompt_part.tops is not None and prompt_part.tops.width == 3
    rows = expected[19:24].topk(3)
    assert np.frombuffer(prompt_part.tops.ids_i32, np.int32).tolist() == rows.indices.flatten().tolist()
    assert f32(prompt_part.tops.logprobs_f32) == pytest.approx(rows.values.flatten().numpy(), abs=1e-5)
    assert f32(prompt_part.wanted_f32).reshape(5, 3)[:, 0] == pytest.approx(expected[19:24, 5].numpy(), abs=1e-5)


def test_prompt_logprobs_end_with_the_prompt_when_emitted_tokens_are_replayed(llama: str) -> None:
    driver = Driver(llama)
    track = driver.admit(1, prompt_of(20), prompt_len=12, logprob_start=0)
    driver.generate(1, chunk=8)
    assert set(track.prompt_logprobs) == set(range(12))


def test_logprobs_are_those_of_the_raw_logits_whatever_shapes_the_draw(llama: str) -> None:
    driver = Driver(llama)
    prompt = prompt_of(25)
    sampling = SamplingParams(
        temperature=0.5, top_k=3, seed=11, logprobs=True, presence_penalty=1.5, logit_bias={40: 30.0}
    )
    track = driver.admit(1, prompt, sampling)
    driver.generate(1)
    expected = Oracle(llama).logprobs(prompt)[-1]
    assert track.emitted == [40]
    assert track.logprobs == pytest.approx([float(expected[40])], abs=1e-5)


def test_several_choices_are_sampled_at_the_first_position_only(llama: str) -> None:
    prompt = prompt_of(18)
    sampling = SamplingParams(temperature=1.0, seed=5, logprobs=True)
    driver = Driver(llama)
    track = driver.admit(1, prompt, sampling, choices=4)
    driver.generate(3, chunk=10)
    assert [len(some) for some in track.choices] == [4, 1, 1]
    assert len(set(track.choices[0])) > 1
    for choice, token in enumerate(track.choices[0]):
        alone = Driver(llama)
        one = alone.admit(1, prompt, SamplingParams(temperature=1.0, seed=5, choice=choice))
        alone.generate(1)
        assert one.emitted == [token]


@pytest.mark.parametrize("length", [21, 32])  # with a partial block, and without one
def test_choices_that_share_a_prompts_blocks_have_the_logprobs_of_transformers(llama: str, length: int) -> None:
    """As the scheduler orders it: the prompt leaves, each choice is admitted with its own tokens."""
    driver, oracle, prompt = Driver(llama, page_size=16), Oracle(llama), prompt_of(length)
    sampling = SamplingParams(temperature=1.0, seed=5, logprobs=True)
    shared = driver.admit(1, prompt, sampling, choices=3)
    driver.step({1: length})
    [firsts] = shared.choices
    full, partial = shared.blocks[: length // 16], shared.blocks[length // 16 :]
    members, copies = [], []
    for choice, token in enumerate(firsts):
        own = partial if not choice else [driver.free.pop() for _ in partial]
        copies += [CopyBlock(partial[0], block, length % 16) for block in own if block not in partial]
        drawn = SamplingParams(temperature=1.0, seed=5, logprobs=True, choice=choice)
        blocks = [*full, *own]
        members.append(
            driver.admit(2 + choice, [*prompt, token], drawn, prompt_len=length, shared=blocks, computed=length)
        )
    driver.release(1)
    del driver.tracks[1]
    driver.step(dict.fromkeys((2, 3, 4), 1), copies=copies)
    driver.generate(14)
    assert len(copies) == (2 if partial else 0)
    for choice, member in enumerate(members):
        tokens = [*prompt, firsts[choice], *member.emitted]
        expected = oracle.logprobs(tokens)
        chosen = [float(expected[at - 1, tokens[at]]) for at in range(length + 1, len(tokens))]
        assert member.logprobs == pytest.approx(chosen, abs=1e-5)
        alone = Driver(llama)
        one = alone.admit(1, prompt, SamplingParams(temperature=1.0, seed=5, choice=choice))
        alone.generate(15)
        assert one.emitted == [firsts[choice], *member.emitted]


def test_a_sampled_request_draws_the_same_tokens_in_any_batch_and_after_a_replay(llama: str) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=1234)
    alone = Driver(llama)
    track = alone.admit(1, prompt_of(22), sampling)
    alone.generate(12)
    together = Driver(llama)
    for key in range(2, 7):
        together.admit(key, prompt_of(10 * key, key), SamplingParams(temperature=1.3, seed=key))
    same = together.admit(1, prompt_of(22), sampling)
    together.generate(12, chunk=16)
    replay = Driver(llama)
    rest = replay.admit(1, prompt_of(22) + track.emitted[:5], sampling, prompt_len=22)
    replay.generate(7)
    assert same.emitted == track.emitted
    assert rest.emitted == track.emitted[5:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_run_close_to_float32(folder: Path, dtype: str) -> None:
    path = tiny_model(folder, "qwen2", dtype=dtype)
    driver = Driver(path)
    assert driver.info.dtype == dtype and driver.pool.tensor.dtype == getattr(torch, dtype)
    prompt = prompt_of(40)
    track = driver.admit(1, prompt, logprob_start=0)
    driver.generate(2, chunk=16)
    expected = Oracle(path).logprobs(prompt)
    ours = np.array([track.prompt_logprobs[position] for position in range(1, 40)])
    theirs = expected[torch.arange(39), torch.tensor(prompt[1:])].numpy()
    assert np.abs(ours - theirs).mean() < (0.1 if dtype == "bfloat16" else 0.02)


def test_a_float32_model_served_as_bfloat16_is_converted(llama: str) -> None:
    driver = Driver(llama, dtype="bfloat16")
    driver.admit(1, prompt_of(10))
    driver.generate(2)
    assert driver.pool.tensor.dtype == torch.bfloat16


def test_digests_and_pushes_come_after_the_step_that_completes_the_blocks(llama: str) -> None:
    pushes: list[Push] = []
    seen: list[Any] = []

    def digest(blocks: Any, tokens: Any) -> Any:
        seen.append((blocks.tolist(), tokens.tolist(), bool(driver.pool.tensor[blocks[0]].isfinite().all())))
        return np.array([7, 2**64 - 1], dtype=np.uint64)

    driver = Driver(llama, digest=digest, push=pushes.append)
    track = driver.admit(1, prompt_of(20))
    push = Push("peer", 3, 0, i32(track.blocks), i32([4, 5]))
    done = driver.step({1: 20}, complete_i32=i32(track.blocks), complete_tokens_i32=i32([16, 4]), pushes=[push])
    assert seen == [(track.blocks, [16, 4], True)]
    assert np.frombuffer(done.digests_u64, np.uint64).tolist() == [7, 2**64 - 1]
    assert pushes == [push]


def test_an_order_without_rows_still_copies_and_pushes(llama: str) -> None:
    pushes: list[Push] = []
    driver = Driver(llama, push=pushes.append)
    driver.pool.tensor[3] = 2.5
    done = driver.step({}, copies=[CopyBlock(3, 4, 16)], pushes=[Push("peer", 1, 0, b"", b"")])
    assert (driver.pool.tensor[4] == 2.5).all() and len(pushes) == 1 and done.counts_u8 == b""


def test_an_order_that_does_not_fit_the_state_is_an_error(llama: str) -> None:
    driver = Driver(llama, num_blocks=8)
    driver.admit(1, prompt_of(10))
    driver.step({1: 10})
    driver.tracks[9] = Track(9, 1, [1], 0, [])
    with pytest.raises(ProtocolError, match="request 9 is not admitted"):
        driver.step({9: 1})
    order = driver.order({1: 2})
    with pytest.raises(ProtocolError, match="2 tokens from 10 of 11 known"):
        driver.worker.step(order)
    with pytest.raises(ProtocolError, match=r"outside 0\.\.7"):
        driver.worker.step(StepOrder(99, b"", b"", b"", admit=[Admit(5, 1, i32([1]), 1, 0, i32([8]), GREEDY)]))
    with pytest.raises(ProtocolError, match="no transfer engine"):
        driver.step({}, pushes=[Push("peer", 1, 0, b"", b"")])
    with pytest.raises(ProtocolError, match="computes no digests"):
        driver.step({}, complete_i32=i32([1]), complete_tokens_i32=i32([16]))
    driver.release(77)
    with pytest.raises(ProtocolError, match="request 77"):
        driver.step({})
