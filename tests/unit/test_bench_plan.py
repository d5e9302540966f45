"""The schedule, the trace's expansion and the prefix structure of synthetic prompts."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pd.bench.serve.options import Options, add_arguments, resolve
from pd.bench.serve.plan import TraceRow, arrivals, plan_runs, read_trace, synthetic_rows, trace_rows
from pd.bench.serve.requests import Ahead, Target, body_of, prompt_of
from pd.bench.serve.tokens import WORDS, plain_range, prompt_tokens
from pd.errors import ConfigError

SAMPLE = Path(__file__).parent.parent / "data" / "conversation_sample.jsonl"
URL = "http://127.0.0.1:8000"


def options(*argv: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(parser.parse_args([URL, *argv]))


def test_fixed_arrivals_are_evenly_spaced_from_zero() -> None:
    assert arrivals(4, 2.0, poisson=False, seed=0) == [0.0, 0.5, 1.0, 1.5]


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrivals(3, float("inf"), poisson=False, seed=0) == [0.0, 0.0, 0.0]


def test_poisson_arrivals_follow_from_the_seed_and_have_the_wanted_mean_and_spread() -> None:
    times = arrivals(4000, 5.0, poisson=True, seed=7)
    assert times == arrivals(4000, 5.0, poisson=True, seed=7)
    assert times != arrivals(4000, 5.0, poisson=True, seed=8)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.15)  # an exponential's deviation is its mean


def test_one_sixteenth_makes_a_hash_block_one_page() -> None:
    trace = read_trace(SAMPLE, None)
    rows = trace_rows(trace, 1 / 16)
    assert len(rows) == 20
    assert {row.block_len for row in rows} == {32}
    for source, row in zip(trace, rows, strict=True):
        assert row.input_len == round(source.input_length / 16)
        assert len(row.hash_ids) * 32 >= row.input_len > (len(row.hash_ids) - 1) * 32 - 1
        assert row.at == pytest.approx(source.timestamp / 1000)


@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 7, 1 / 100, 1 / 5000])
def test_every_prompt_has_exactly_its_length_at_any_scale(scale: float) -> None:
    for row in trace_rows(read_trace(SAMPLE, None), scale):
        tokens = prompt_tokens(row.hash_ids, row.input_len, row.block_len, 0, (10, 1000))
        assert len(tokens) == row.input_len >= 1
        assert row.output_len >= 1


def test_the_longest_prompt_and_answer_of_the_trace_fit_8k_at_one_sixteenth() -> None:
    (row,) = trace_rows([TraceRow(0, 126195, 2000, list(range(247)))], 1 / 16)
    assert (row.input_len, row.output_len) == (7887, 125)
    assert row.input_len + row.output_len <= 8192


def test_equal_hash_ids_give_equal_blocks_and_others_differ() -> None:
    a = prompt_tokens((0, 5, 9), 96, 32, 3, (100, 30000))
    b = prompt_tokens((0, 5, 8), 80, 32, 3, (100, 30000))
    assert (a[:64] == b[:64]).all()
    assert (a[64:80] != b[64:]).any()
    assert not (set(a[:32].tolist()) == set(a[32:64].tolist()))
    assert a.min() >= 100 and a.max() < 30000
    assert (a != prompt_tokens((0, 5, 9), 96, 32, 4, (100, 30000))).any()


def test_prefixes_are_shared_exactly_as_far_as_the_hashes_are() -> None:
    rows = trace_rows(read_trace(SAMPLE, None), 1 / 16)
    prompts = [prompt_tokens(row.hash_ids, row.input_len, 32, 0, (1000, 30000)) for row in rows]
    for i, first in enumerate(rows):
        for j in range(i):
            shared = 0
            while shared < min(len(first.hash_ids), len(rows[j].hash_ids)) and (
                first.hash_ids[shared] == rows[j].hash_ids[shared]
            ):
                shared += 1
            length = min(len(prompts[i]), len(prompts[j]))
            same = prompts[i][:length] == prompts[j][:length]
            assert same[: shared * 32].all()
            assert not same[shared * 32 :].all() or length <= shared * 32


def test_tokens_do_not_change_between_versions() -> None:
    """A recorded run must be reproducible from its seed."""
    assert prompt_tokens((0, 1), 6, 3, 0, (1000, 30000)).tolist() == [29276, 18555, 18987, 4433, 7180, 4188]


def test_synthetic_rows_keep_their_bounds_and_share_nothing() -> None:
    rows = synthetic_rows(200, (10, 20), (3, 5), seed=1)
    assert {row.input_len for row in rows} == set(range(10, 21))
    assert {row.output_len for row in rows} == {3, 4, 5}
    assert len({row.hash_ids for row in rows}) == 200
    assert rows == synthetic_rows(200, (10, 20), (3, 5), seed=1)


def test_each_rate_is_a_run_with_the_same_lengths_and_other_tokens() -> None:
    chosen = options("--rate", "2,4", "--num-requests", "5", "--input-len", "8:16")
    first, second = plan_runs(chosen)
    assert (first.offered_rps, second.offered_rps) == (2.0, 4.0)
    assert [row.at for row in second.rows] == [0, 0.25, 0.5, 0.75, 1.0]
    assert [row.input_len for row in first.rows] == [row.input_len for row in second.rows]
    target = Target("m", (0, 1000), "")
    assert prompt_of(first.rows[0], first, target, chosen) != prompt_of(second.rows[0], second, target, chosen)
    warm = first.warmup(2)
    assert len(warm.rows) == 2
    assert prompt_of(warm.rows[0], warm, target, chosen) != prompt_of(first.rows[0], first, target, chosen)


def test_a_trace_keeps_its_times_or_takes_a_rate() -> None:
    own = plan_runs(options("--trace", str(SAMPLE), "--rows", "12", "--time-scale", "1,0.5"))
    assert [run.rows[-1].at for run in own] == [3.0, 1.5]
    assert own[0].offered_rps == pytest.approx(11 / 3)
    given = plan_runs(options("--trace", str(SAMPLE), "--rows", "12", "--rate", "10"))
    assert [row.at for row in given[0].rows][-1] == pytest.approx(1.1)
    assert given[0].rows[5].hash_ids == own[0].rows[5].hash_ids


def test_a_broken_trace_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    good = '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n'
    for bad in ('{"timestamp": 0}\n', "nonsense\n", good.replace("[1, 2]", "[1]")):
        path.write_text(good + bad)
        with pytest.raises(ConfigError, match="line 2"):
            read_trace(path, None)
    assert len(read_trace(path, 1)) == 1
    path.write_text("")
    with pytest.raises(ConfigError, match="no rows"):
        read_trace(path, None)


@pytest.mark.parametrize("size", [2, 16, 512, 32000, 128256, 151936])
def test_the_plain_range_lies_inside_any_vocabulary(size: int) -> None:
    low, high = plain_range(size)
    assert 0 <= low < high <= size


def test_bodies_are_taken_in_order_whatever_the_bound() -> None:
    rows = synthetic_rows(50, (1, 9), (1, 9), 0)
    for limit in (1, 25, 10_000):
        ahead = Ahead(iter(rows), lambda row: b"x" * 5 + str(row.index).encode(), limit)
        taken = []
        for _ in rows:
            taken.append(int(ahead.take()[5:]))
            ahead.fill()
        assert taken == list(range(50))


def test_bodies_of_the_three_endpoints() -> None:
    import msgspec

    def body(*argv: str) -> dict[str, Any]:
        chosen = options("--rate", "1", "--input-len", "4", "--output-len", "3", *argv)
        run = plan_runs(chosen)[0]
        limit = len(WORDS) if chosen.endpoint == "chat" else 500
        decoded = msgspec.json.decode(body_of(run.rows[0], run, Target("m", (0, limit), ""), chosen))
        assert isinstance(decoded, dict)
        return decoded

    completions = body()
    assert len(completions["prompt"]) == 4 and completions["max_tokens"] == 3 and completions["stream"] is True
    assert completions["stream_options"] == {"include_usage": True} and completions["ignore_eos"] is True
    assert "ignore_eos" not in body("--no-ignore-eos")
    assert body("--return-token-ids")["return_token_ids"] is True
    assert len(body("--endpoint", "chat")["messages"][0]["content"].split()) == 4
    native = body("--endpoint", "generate", "--temperature", "0.5")
    assert native["input_ids"] == completions["prompt"]
    assert native["sampling_params"] == {"temperature": 0.5, "max_new_tokens": 3, "ignore_eos": True}


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        ([], "--rate"),
        (["--rate", "0"], "--rate"),
        (["--rate", "fast"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--poisson", "--trace", str(SAMPLE)], "--poisson"),
        (["--rate", "1", "--rows", "3"], "--rows"),
        (["--rate", "1", "--length-scale", "1/16"], "--length-scale"),
        (["--trace", str(SAMPLE), "--length-scale", "1,2"], "--length-scale"),
        (["--trace", str(SAMPLE), "--length-scale", "1/0"], "--length-scale"),
        (["--trace", str(SAMPLE), "--rate", "1", "--time-scale", "2"], "--time-scale"),
        (["--trace", str(SAMPLE), "--input-len", "5"], "--input-len"),
        (["--trace", "/nowhere.jsonl"], "--trace"),
        (["--rate", "1", "--input-len", "9:3"], "--input-len"),
        (["--rate", "1", "--output-len", "0"], "--output-len"),
        (["--rate", "1", "--num-requests", "0"], "--num-requests"),
        (["--rate", "1", "--timeout", "0"], "--timeout"),
        (["--rate", "1", "--seed", "-1"], "--seed"),
        (["--rate", "1", "--slo-ttft-ms", "-1"], "--slo-ttft-ms"),
        (["--rate", "1", "--token-range", "5:5"], "--token-range"),
        (["--rate", "1", "--token-range", "5:9", "--vocab-size", "100"], "--vocab-size"),
        (["--rate", "1", "--token-range", "5:9", "--endpoint", "chat"], "--token-range"),
        (["--rate", "1", "--return-token-ids", "--endpoint", "generate"], "--return-token-ids"),
        (["--rate", "1", "--json", "/nowhere/x.json"], "--json"),
        (["--rate", "1", "--header", "nonsense"], "--header"),
        (["--rate", "1", "--url", URL], "--url"),
        (["--rate", "1", "--temperature", "-1"], "--temperature"),
    ],
)
def test_a_flag_that_cannot_act_is_refused_by_name(argv: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(*argv)
    assert caught.value.field == field


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://h/?q=1"])
def test_a_url_that_is_no_base_url_is_refused(url: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ConfigError, match="--url"):
        resolve(parser.parse_args([url, "--rate", "1"]))


def test_a_trailing_v1_is_not_doubled_and_options_are_frozen() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    chosen = resolve(parser.parse_args(["--url", "https://host/api/v1/", "--rate", "1/2,inf", "--header", "A: b: c"]))
    assert chosen.url == "https://host/api"
    assert chosen.rates == (0.5, float("inf"))
    assert chosen.headers == (("A", "b: c"),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.seed = 1  # type: ignore[misc]


def test_a_plot_without_matplotlib_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pd-serve\[bench\]"):
        options("--rate", "1", "--plot", "x.png")
