"""What `pd bench pair` plans, how it names what it starts, and what it makes of what it saw."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pd.bench.pair import curves, outcomes, parts
from pd.bench.pair.launch import as_typed, environment_of, serve_line
from pd.bench.pair.loads import arguments, warming
from pd.bench.pair.options import Options, add_arguments, resolve
from pd.bench.pair.outcomes import When
from pd.bench.pair.plan import Step, deployment_of, fraction, key_of, left_out, plan, setup_of
from pd.bench.pair.report import write_curves
from pd.bench.pair.single import log_lines, medians
from pd.bench.serve.load import Outcome
from pd.bench.serve.plan import Row, plan_runs
from pd.bench.serve.sse import OpenAiAnswer
from pd.errors import ConfigError

INSTALLED = ("direct", "nixl")


def options(folder: Path, *words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(parser.parse_args(["--out", str(folder), *words]))


def steps(asked: Options, **chunks: int) -> list[Step]:
    return plan(asked, [name for name in INSTALLED if name in asked.transfers], chunks)


def step(asked: Options, name: str, **chunks: int) -> Step:
    (found,) = (one for one in steps(asked, **chunks) if one.name == name)
    return found


# --- what is measured ---


def test_every_transfer_is_verified_and_pushed_and_the_first_by_visible_devices_too(tmp_path: Path) -> None:
    names = [one.name for one in steps(options(tmp_path, "--only", "copy,verify,push"))]
    assert names == [
        "copy",
        *("verify-direct", "push-direct"),
        *("verify-direct-visible", "push-direct-visible"),
        *("verify-nixl", "push-nixl"),
    ]


def test_both_systems_bear_the_same_loads(tmp_path: Path) -> None:
    asked = options(tmp_path, "--only", "tune,load,trace", "--trace", "tests/data/conversation_sample.jsonl")
    found = [one for one in steps(asked) if one.phase != "kill"]
    assert {one.system for one in found} == {"pd", "unified"}
    loads = {
        system: [(one.phase, one.rate, one.time_scale, one.seed) for one in found if one.system == system]
        for system in ("pd", "unified")
    }
    assert loads["pd"] == loads["unified"]
    assert len({one.seed for one in found if one.phase == "load"}) == len(asked.rates), (
        "no rate repeats another's prompts"
    )


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    found = left_out(options(tmp_path, "--transfer", "direct,mooncake"), {"mooncake": "no such backend"})
    assert found == {"transfer mooncake": "no such backend", "trace": "no --trace FILE was given"}


def test_nothing_is_tuned_where_there_is_no_choice(tmp_path: Path) -> None:
    assert not [one for one in steps(options(tmp_path, "--chunk-sizes", "4096")) if one.phase == "tune"]


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--only", "verify,dance"), "--only"),
        (("--device", "cpu", "--one-gpu"), "--one-gpu"),
        (("--rates", "4,0"), "--rates"),
        (("--rates", "four"), "--rates"),
        (("--prompts", "1.5"), "--prompts"),
        (("--trace", "/nowhere"), "--trace"),
        (("--model", "/nowhere"), "--model"),
        (("--repeats", "0"), "--repeats"),
        (("--kill-rate", "-1"), "--kill-rate"),
        (("--time-limit", "0"), "--time-limit"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, words: tuple[str, ...], flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(tmp_path, *words)
    assert caught.value.field == flag


# --- what is started ---


def lines(folder: Path, name: str, *words: str, **chunks: int) -> dict[str, str]:
    """The commands of a step's instances, without ports and what is the same in all."""
    asked = options(folder, *words)
    setup = setup_of(step(asked, name, **chunks), asked)
    assert setup is not None
    found = {}
    for one in setup.instances:
        line = serve_line(asked, "MODEL", setup, one, (1, 2))
        found[one.name] = as_typed(line, environment_of(one)).replace(" --port 1", "").replace(" --control-port 2", "")
    return found


def test_the_decode_instance_is_on_the_second_gpu(tmp_path: Path) -> None:
    assert lines(tmp_path, "load-pd-4", "--only", "load") == {
        "decode": "pd serve MODEL --role decode --transfer direct --load-format dummy --base-gpu-id 1 "
        "--name decode --log-format json",
        "prefill": "pd serve MODEL --role prefill --transfer direct --load-format dummy "
        "--name prefill --log-format json",
    }


def test_devices_may_be_shown_to_each_process_instead(tmp_path: Path) -> None:
    found = lines(tmp_path, "push-direct-visible", "--only", "push")
    assert found["decode"].startswith("CUDA_VISIBLE_DEVICES=1 pd serve") and "--base-gpu-id" not in found["decode"]
    assert found["prefill"].startswith("CUDA_VISIBLE_DEVICES=0 pd serve")


def test_a_systems_best_chunk_size_is_that_of_whoever_prefills(tmp_path: Path) -> None:
    found = lines(tmp_path, "load-pd-4", "--only", "load", pd=4096)
    assert "--chunked-prefill-size 4096 --max-prefill-tokens 4096" in found["prefill"]
    assert "--chunked-prefill-size" not in found["decode"]
    found = lines(tmp_path, "load-unified-4", "--only", "load", unified=2048)
    assert all("--chunked-prefill-size 2048" in line for line in found.values()) and len(found) == 2


@pytest.mark.parametrize("name", ["verify-direct", "load-pd-4", "load-unified-4"])
def test_instances_on_one_gpu_share_its_memory(tmp_path: Path, name: str) -> None:
    asked = options(tmp_path, "--one-gpu")
    setup = setup_of(step(asked, name), asked)
    assert setup is not None and {one.gpu for one in setup.instances} == {0}
    free = 1.0
    for one in setup.instances:
        free -= free * fraction(setup, one.name)
        assert one.share == pytest.approx(
            fraction(setup, one.name) * (free / (1 - fraction(setup, one.name))), abs=0.01
        )
    assert 0.1 < free < 0.2, "contexts and graphs need some, too"


def test_a_pool_of_a_given_size_is_left_alone(tmp_path: Path) -> None:
    found = lines(tmp_path, "load-pd-4", "--one-gpu", "--serve-flags", "--max-total-tokens 65536")
    assert all("--mem-fraction-static" not in line and "--max-total-tokens 65536" in line for line in found.values())


def test_the_reference_is_beside_the_pair_but_gets_no_load(tmp_path: Path) -> None:
    asked = options(tmp_path)
    setup = setup_of(step(asked, "verify-direct"), asked)
    assert setup is not None and "reference" in {one.name for one in setup.instances}
    assert sorted(setup.routed) == ["decode", "prefill"]


def test_the_load_is_what_bench_serve_would_send(tmp_path: Path) -> None:
    asked = options(tmp_path, "--seconds", "10", "--slo-itl-ms", "25")
    load = arguments(step(asked, "load-pd-4"), asked, "http://127.0.0.1:1")
    assert (load.rates, load.poisson, load.num_requests, load.slo_itl_ms) == ((4.0,), True, 40, 25.0)
    assert (load.input_len, load.output_len) == ((2048, 2048), (512, 512))
    (run,) = plan_runs(load)
    warm = warming(run)
    assert [row.input_len for row in warm.rows] == [2048] * 8 and max(row.output_len for row in warm.rows) == 8
    assert warm.token_seed != run.token_seed


# --- parts ---


def part(asked: Options, one: Step, **result: Any) -> parts.Part:
    about = (one.name, one.phase, key_of(one, asked), deployment_of(asked), "2026-01-01", "2 x GPU")
    return parts.Part(*about, one.transfer, one.visible, ["pd serve"], result)


def test_a_part_is_measured_again_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    asked = options(tmp_path)
    one = step(asked, "push-direct")
    kept = parts.Parts(tmp_path / "parts")
    assert kept.get(one.name, key_of(one, asked)) is None
    kept.put(part(asked, one, lengths={}))
    assert kept.get(one.name, key_of(one, asked)) is not None
    other = replace(asked, seconds=99.0, rates=(1.0,))
    assert kept.get(one.name, key_of(one, other)) is not None, "a push does not depend on the load"
    assert kept.get(one.name, key_of(one, replace(asked, prompts=(7,)))) is None
    kept.put(part(asked, one, problem="it broke"))
    assert kept.get(one.name, key_of(one, asked)) is None, "what failed is tried again"


def test_a_rehearsal_on_one_gpu_is_no_part_of_the_result(tmp_path: Path) -> None:
    asked, rehearsal = options(tmp_path), options(tmp_path, "--one-gpu")
    kept = parts.Parts(tmp_path / "parts")
    kept.put(part(rehearsal, step(rehearsal, "push-nixl"), lengths={}))
    assert kept.all(deployment_of(asked)) == [] and len(kept.all(deployment_of(rehearsal))) == 1


def point(
    system: str, rate: float, share: float = 1.0, itl: float = 10.0, good: int = 100, chunk: int = 0
) -> dict[str, Any]:
    latency = {"p50": itl / 2, "p90": itl, "p99": itl}
    goodput = {"requests": good, "rps": good / 10, "slo_ttft_ms": 500.0, "slo_itl_ms": 30.0}
    figures = {"ttft_ms": latency, "itl_ms": latency, "e2e_ms": latency, "goodput": goodput, "warnings": []}
    return {"system": system, "rate": rate, "chunk": chunk, "completed_share": share, **figures}


def test_parts_make_one_document(tmp_path: Path) -> None:
    asked = options(tmp_path)
    kept = parts.Parts(tmp_path / "parts")
    figures = {"gbps": 300.0, "after_compute_ms": 3.0, "after_first_ms": 4.0, "second_token_ms": 200.0, "share": 0.015}
    found = {"8192": {"fresh": figures, "cached": {**figures, "gbps": 320.0}}}
    kept.put(part(asked, step(asked, "copy"), copy_gbps=400.0, direct_alone_gbps=350.0))
    kept.put(part(asked, step(asked, "push-direct"), lengths=found))
    kept.put(part(asked, step(asked, "push-direct-visible"), lengths=found))
    kept.put(part(asked, step(asked, "push-nixl"), problem="no NVLink"))
    for system, itl in (("pd", 5.0), ("unified", 60.0)):
        kept.put(part(asked, step(asked, f"load-{system}-4"), **point(system, 4.0, itl=itl)))
    document = parts.merge(kept.all(deployment_of(asked)), "pd bench pair", {"transfer mooncake": "not installed"})
    assert document["copy_gbps"] == 400.0
    assert document["push_gbps"] == {"direct": {"8192": 300.0}, "direct, CUDA_VISIBLE_DEVICES": {"8192": 300.0}}
    assert document["push_of_copy"]["direct"] == {"8192": 0.75}
    assert document["second_token_share"]["direct"] == {"8192": 0.015}
    assert (document["rate"], document["itl_p99_ms"]) == (4.0, {"pd": 5.0, "unified": 60.0})
    assert document["itl_p99_ratio"] == 12.0 and len(document["curves"]) == 2
    assert document["failed"] == {"push-nixl": "no NVLink"}
    assert document["not_measured"] == {"transfer mooncake": "not installed"}
    json.dumps(document)


def test_medians_keep_the_extremes_of_the_rate() -> None:
    found = medians([{"gbps": rate, "share": 0.1} for rate in (1.0, 2.0, 9.0)])
    assert found == {"gbps": 2.0, "share": 0.1, "gbps_min": 1.0, "gbps_max": 9.0}


def test_a_log_is_read_past_what_is_no_json(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('a warning\n{"event": "a"}\n{"event": "cut o')
    assert list(log_lines(log)) == [{"event": "a"}]


# --- curves ---


def outcome(sent: float, tokens: tuple[float, ...], ended: float, error: str = "", message: str = "") -> Outcome:
    """Times are seconds after the run's start, which is at 100 on the clock."""
    answer = OpenAiAnswer()
    for time in tokens:
        answer.times.append(100.0 + time)
        answer.counts.append(1)
    if error:
        answer.fail(error, message)
    return Outcome(Row(0, sent, 10, 5, (), 10), "id", sent, ended, 100.0, answer)


def test_a_system_that_keeps_up_completes_all_of_its_load() -> None:
    steady = [outcome(at / 10, (), at / 10 + 3.0) for at in range(300)]
    assert curves.completed_share(steady) == pytest.approx(1.0)


def test_a_queue_that_grows_is_load_that_is_not_completed_though_every_request_ends() -> None:
    """10 come a second, 8 go."""
    late = [outcome(at / 10, (), 2.0 + at / 8) for at in range(300)]
    assert curves.completed_share(late) == pytest.approx(0.8)


def test_the_batch_may_grow_while_a_run_begins() -> None:
    ramp = [outcome(at / 10, (), at / 10 + min(5.0, at / 20)) for at in range(300)]
    assert curves.completed_share(ramp) == pytest.approx(1.0)


def test_failed_requests_are_not_completed() -> None:
    some = [outcome(at / 10, (), at / 10 + 1.0, error="http_503" if at % 4 == 0 else "") for at in range(200)]
    assert curves.completed_share(some) == pytest.approx(0.75)


def test_systems_are_compared_at_the_highest_rate_that_both_keep_up_with() -> None:
    points = [
        point("pd", 4.0, itl=5.0),
        point("unified", 4.0, itl=50.0),
        point("pd", 8.0, itl=6.0),
        point("unified", 8.0, 0.985, itl=90.0),
        point("pd", 12.0, itl=7.0),
        point("unified", 12.0, 0.9, itl=200.0),
        point("pd", 16.0, 0.99, itl=8.0),
    ]
    found = curves.compare(points)
    assert (found["rate"], found["itl_p99_ms"]) == (8.0, {"pd": 6.0, "unified": 90.0})
    assert found["itl_p99_ratio"] == 15.0 and found["unified_wins"] == []
    assert found["keeps_up_to"] == {"pd": 16.0, "unified": 8.0}


def test_where_colocation_is_ahead_is_said() -> None:
    found = curves.compare([point("pd", 2.0, itl=8.0, good=90), point("unified", 2.0, itl=4.0, good=100)])
    assert "2/s: ITL p99 4.0 ms, pd 8.0" in found["unified_wins"]
    assert "2/s: 100 requests within the limits, pd 90" in found["unified_wins"]


def test_without_a_rate_that_both_keep_up_with_nothing_is_claimed() -> None:
    found = curves.compare([point("pd", 2.0), point("unified", 2.0, 0.5)])
    assert found["rate"] is None and found["itl_p99_ratio"] is None


def test_the_best_chunk_size_has_the_most_goodput_and_then_the_smoothest_answers() -> None:
    tuned = [
        point("unified", 8.0, good=90, itl=5.0, chunk=1024),
        point("unified", 8.0, good=99, itl=80.0, chunk=8192),
        point("unified", 8.0, good=99, itl=40.0, chunk=2048),
        point("pd", 8.0, good=99, chunk=8192),
    ]
    assert curves.best_chunk(tuned) == {"unified": 2048, "pd": 8192}


def test_rates_beyond_hope_are_left_out() -> None:
    points = [point("unified", 8.0, 0.95), point("unified", 12.0, 0.7), point("pd", 4.0, 0.1)]
    assert curves.hopeless(points, "unified", 16.0) == 12.0
    assert curves.hopeless(points, "unified", 12.0) is None


def test_curves_are_drawn_though_a_system_completed_nothing(tmp_path: Path) -> None:
    nothing = {**point("pd", 4.0, 0.0), "ttft_ms": None, "itl_ms": None}
    write_curves(tmp_path / "curves.png", "title", [point("unified", 4.0), nothing])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# --- kills ---

KILLED, BACK = 10.0, 20.0


@pytest.mark.parametrize(
    ("one", "when", "stalled"),
    [
        (outcome(1.0, (2.0, 3.0), 4.0), When.BEFORE, 0.0),
        (outcome(9.0, (12.5, 12.6), 12.6), When.PROMPT, 3.5),
        (outcome(8.0, (9.0, 9.5, 12.0, 12.1), 12.1), When.ANSWER, 2.5),
        (outcome(11.0, (11.2,), 11.2), When.DOWN, 0.2),
        (outcome(21.0, (21.1,), 21.2), When.AFTER, 0.1),
        (outcome(8.0, (9.0,), 10.2, "truncated"), When.ANSWER, 1.2),
    ],
)
def test_a_request_is_told_by_where_it_was_when_the_instance_died(one: Outcome, when: When, stalled: float) -> None:
    seen = outcomes.seen(one, KILLED, BACK)
    assert seen.when is when and seen.stalled == pytest.approx(stalled)
    assert seen.completed is (one.answer.error_kind is None)


def test_a_kill_is_summed_up_by_what_clients_saw() -> None:
    found = outcomes.summary(
        [
            outcome(1.0, (2.0, 3.0), 4.0),
            outcome(9.0, (12.5, 12.6), 12.6),
            outcome(9.5, (9.6, 9.9, 10.1), 10.1),
            outcome(8.0, (9.0,), 10.2, "stream_error", "the decode instance is gone"),
            outcome(12.0, (), 12.1, "http_503", "no decode instance is available"),
            outcome(14.0, (), 14.1, "http_503", "no decode instance is available"),
            outcome(15.0, (), 135.0, "timeout", "no complete answer within 120 s"),
            outcome(22.0, (22.1,), 22.2),
        ],
        KILLED,
        BACK,
    )
    clients = found["clients"]
    assert clients["under way, no token yet"]["completed_after_stall"] == 1
    assert clients["under way, in the middle of its answer"]["errors"] == {
        "stream_error: the decode instance is gone": 1
    }
    assert clients["sent while the instance was down"]["errors"]["http_503: no decode instance is available"] == 2
    assert clients["sent after it was back"]["completed"] == 1
    assert (found["requests"], found["failed"], found["hung"], found["down_s"]) == (8, 4, 1, 10.0)
    assert found["well_again_s"] == 5.0
    assert sum(group["requests"] for group in clients.values()) == 8
