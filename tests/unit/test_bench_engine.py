"""What `pd bench engine` makes of arrival times, traces, shapes and reports."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pd.bench.engine import cases, http
from pd.bench.engine.client import Answered
from pd.bench.engine.command import Figures, layer_weights, prefill_limit, step_bytes, table
from pd.bench.engine.shapes import SHAPES, make_model
from pd.bench.engine.traces import read_shares
from pd.cli import main
from pd.errors import PdError
from pd.models.checkpoint import read_json
from pd.models.dense import dense_config
from pd.models.info import check_model

FLOORS = {
    "device": "a GPU",
    "torch": "2",
    "copy_gbps": 4000.0,
    "read_gbps": 4200.0,
    "gemm_tflops": 700.0,
    "sdpa_tflops": {"2048": 400.0, "8192": 600.0},
    "prompt_ms": {"2048": 46.0},
}


def llama(folder: Path) -> str:
    return str(make_model(folder, "llama-3.1-8b"))


def test_gaps_count_only_while_every_request_decodes() -> None:
    early = Answered(0.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    late = Answered(0.0, [2.0, 3.0, 4.0, 5.0, 6.5, 8.0])
    # From the late one's fourth token, 5.0, to the early one's last, 7.0.
    assert cases.steady_gaps([early, late]) == [1.0, 0.5, 0.5]


def test_a_trace_gives_idle_time_and_kernels(tmp_path: Path) -> None:
    events = [
        {"name": "void gemm<int, 3>(float*)", "cat": "kernel", "ts": 100.0, "dur": 40.0},
        {"name": "void gemm<int, 4>(float*)", "cat": "kernel", "ts": 130.0, "dur": 30.0},  # overlaps
        {"name": "Memcpy HtoD (Pinned -> Device)", "cat": "gpu_memcpy", "ts": 180.0, "dur": 20.0},
        {"name": "aten::mm", "cat": "cpu_op", "ts": 0.0, "dur": 500.0},
        {"name": "a flow", "ph": "s", "id": 3, "ts": 1},
    ]
    path = tmp_path / "a.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    shares = read_shares(path)
    assert shares.seconds == pytest.approx(100e-6)
    assert shares.idle == pytest.approx(0.2)
    assert shares.kernels == [("gemm", pytest.approx(70e-6), 2), ("Memcpy HtoD", pytest.approx(20e-6), 1)]


def test_a_trace_without_kernels_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.trace.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": []}'))
    with pytest.raises(ValueError, match="no kernel"):
        read_shares(path)


def test_the_shape_has_the_real_models_weights_and_can_be_served_without_any(tmp_path: Path) -> None:
    path = llama(tmp_path)
    shape = dense_config(path, read_json(path, "config.json"))
    assert layer_weights(shape) == 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    # 7.5 G numbers that a step reads, and 128 KiB of KV a token.
    assert step_bytes(shape, 0) == pytest.approx(15.0e9, rel=0.01)
    assert step_bytes(shape, 3) - step_bytes(shape, 0) == 3 * cases.CONTEXT * 131072
    info = check_model(path, dummy=True)
    assert (info.num_kv_heads, info.head_dim, info.dtype) == (8, 128, "bfloat16")
    with pytest.raises(PdError, match="no weights"):
        check_model(path)


def test_the_limit_of_prefill_is_what_was_measured_or_follows_from_rates(tmp_path: Path) -> None:
    path = llama(tmp_path)
    shape = dense_config(path, read_json(path, "config.json"))
    assert prefill_limit(shape, 2048, FLOORS) == pytest.approx(2048 / 0.046)
    # 14 GFLOP of projections a token at 700 TFLOP/s, and attention over half of 8,192 tokens at 600.
    each = 2 * layer_weights(shape) / 700e12 + 4 * 4096 * 4096.5 * 32 / 600e12
    assert prefill_limit(shape, 8192, FLOORS) == pytest.approx(1 / each)


def test_a_report_with_failed_requests_gives_no_rate() -> None:
    run = {"completed": cases.REQUESTS, "output_tok_s": 1234.5}
    assert http.out_tok_s(json.dumps({"runs": [run]})) == 1234.5
    with pytest.raises(PdError, match="1 requests failed"):
        http.out_tok_s(json.dumps({"runs": [run | {"completed": cases.REQUESTS - 1}]}))


def test_the_table_names_every_figure_and_its_ratio() -> None:
    figures = Figures("a GPU", "2026-01-01", "pd bench engine", FLOORS)
    figures.decode_ms, figures.floor_ms = {"8": 5.0}, {"8": 4.0}
    figures.prefill_tok_s, figures.prefill_limit_tok_s = {"2048": 40_000.0}, {"2048": 50_000.0}
    figures.ttft_ms = {"2048": 51.2}
    figures.throughput_out_tok_s, figures.http_out_tok_s, figures.idle_share = 6000.0, 5700.0, 0.015
    cells = [list(column.cells) for column in table(figures).columns]
    rows = dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))
    assert rows["decode step, batch 8, ms"] == ("5.00", "4.00", "1.25")
    assert rows["prefill 2048, tok/s"] == ("40000", "50000", "0.80")
    assert rows["first token of 2048, ms"] == ("51.2", "41.0", "1.25")
    assert rows["the same through router and HTTP"] == ("5700", "6000", "0.95")
    assert rows["GPU idle in 200 steps of 64"][0] == "1.5%"


def test_wrong_arguments_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--only", "decode,everything"]) == 2
    assert capsys.readouterr().err.startswith("pd: --only: everything: not one of decode, ")


def test_every_shape_is_a_models(tmp_path: Path) -> None:
    for name in SHAPES:
        assert check_model(str(make_model(tmp_path, name)), dummy=True).num_layers > 0
