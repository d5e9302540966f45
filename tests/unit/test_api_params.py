import json

import msgspec
import pytest

from pd.api.params import Defaults, ModelLimits, SamplingFields, resolve
from pd.errors import ModelError, RequestError

MODEL = ModelLimits(vocab_size=100, context_length=64, eos_token_ids=(1, 2))


def resolved(model=MODEL, max_tokens=None, min_tokens=None, **fields):
    request = msgspec.convert(fields, SamplingFields)
    return resolve(request, model, max_tokens=("max_tokens", max_tokens), min_tokens=("min_tokens", min_tokens))


def test_nothing_given_means_the_models_defaults():
    model = ModelLimits(100, 64, (1,), Defaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1))
    sampling = resolved(model).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.9, 20)
    assert sampling.repetition_penalty == 1.1 and sampling.stop_token_ids == (1,)
    given = resolved(model, temperature=0.0, top_k=-1).sampling
    assert (given.temperature, given.top_k, given.top_p) == (0.0, 0, 0.9)


def test_one_who_gives_no_seed_gets_a_fresh_one():
    seeds = {resolved().sampling.seed for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert not resolved().seeded and resolved(seed=5).seeded
    assert resolved(seed=5).sampling.seed == 5 == resolved(sampling_seed=5).sampling.seed
    assert 0 <= resolved(seed=-1).sampling.seed < 1 << 63


def test_ignore_eos_keeps_the_clients_own_stop_ids():
    assert resolved(stop_token_ids=[7, 1]).sampling.stop_token_ids == (1, 2, 7)
    assert resolved(stop_token_ids=[7], ignore_eos=True).sampling.stop_token_ids == (7,)


def test_stop_is_a_string_or_strings():
    assert resolved(stop="a").stop == ("a",)
    assert resolved(stop=["a", "b"]).stop == ("a", "b")
    assert resolved().stop == ()


def test_the_limit_is_the_clients_or_the_models_and_remembers_its_name():
    assert (resolved(max_tokens=5).max_tokens, resolved(max_tokens=5).max_tokens_name) == (5, "max_tokens")
    by_model = resolved(ModelLimits(100, 64, (), Defaults(max_tokens=9)))
    assert (by_model.max_tokens, by_model.max_tokens_name) == (9, "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": 1 << 70}, "seed"),
        ({"logit_bias": {"100": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"5": 200.0}}, "logit_bias"),
        ({"stop_token_ids": [100]}, "stop_token_ids"),
        ({"stop": ["ok", ""]}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"stop_regex": "a*"}, "stop_regex"),
    ],
)
def test_a_value_out_of_range_names_its_field(fields, param):
    with pytest.raises(RequestError) as caught:
        resolved(**fields)
    assert caught.value.param == param and caught.value.status == 400


def test_generation_config_is_read_and_checked(tmp_path):
    assert Defaults.read(str(tmp_path)) == Defaults()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.7, "max_new_tokens": 50, "do_sample": True, "eos_token_id": 3}))
    assert Defaults.read(str(tmp_path)) == Defaults(temperature=0.7, max_tokens=50)
    file.write_text(json.dumps({"temperature": "warm"}))
    with pytest.raises(ModelError, match="generation_config"):
        Defaults.read(str(tmp_path))
