"""Replays a trace against a real cluster and holds the answers and the books against what they must be.

    python -m tests.replay --rows 200 --trace conversation_trace.jsonl --json replay.json

Starts `pd up` with several prefill and decode instances, sends the trace's rows with `pd bench serve`, then checks: no
errors, cache hits on both sides, bytes that landed are exactly the blocks that the decode instances lacked, books
balance, and a sample of the answers equals transformers in float32 (text of the replay, logprobs of a second request).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PAGE = 32
LOGPROB_TOLERANCE = 1e-4


@dataclass
class Cluster:
    url: str
    prefills: list[str]
    decodes: list[str]
    process: subprocess.Popen[str]


@contextmanager
def cluster(model: str | None, prefill: int, decode: int, log: Path) -> Iterator[Cluster]:
    """`pd up` as a child process with local prefill off; stopped by SIGINT, which must end it with exit code 0."""
    command = [sys.executable, "-m", "pd", "up", *([model] if model else [])]
    command += ["--prefill", str(prefill), "--decode", str(decode), "--port", "0", "--local-prefill", "never"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)
        assert process.stdout is not None
        try:
            url = _ready_url(process, log)
            workers = httpx.get(f"{url}/server_info").json()["workers"]
            by_pool = {pool: [w["url"] for w in workers if w["pool"] == pool] for pool in ("prefill", "decode")}
            yield Cluster(url, by_pool["prefill"], by_pool["decode"], process)
        finally:
            process.terminate()
            code = process.wait(120)
            process.stdout.close()
    assert code == 0, f"pd up ended with {code}: {log.read_text()[-2000:]}"


def _ready_url(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"pd is ready at (\S+)\. Try", line)
        if found:
            return found[1]
    raise AssertionError(f"pd up did not start: {log.read_text()[-2000:]}")


def metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics, by name and labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x and x[0] != "#")}


def audit(url: str, bound: float = 2.0) -> dict[str, Any]:
    """The instance's books, once it is at rest; at most `bound` seconds from now."""
    end = time.monotonic() + bound
    while True:
        books: dict[str, Any] = httpx.get(f"{url}/server_info", params={"audit": "1"}).json()["audit"]
        held = sum(books.get(state, 0) for state in ("owned", "incoming", "quarantined"))
        if (books["balanced"] and not held) or time.monotonic() > end:
            return books
        time.sleep(0.05)


@dataclass
class Outcome:
    """What was seen; `problems` is empty when all is well."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


def run_bench(url: str, trace: Path, rows: int, time_scale: float, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    command = [sys.executable, "-m", "pd", "bench", "serve", url, "--trace", str(trace), "--rows", str(rows)]
    command += ["--length-scale", "0.0625", "--time-scale", str(time_scale), "--no-progress"]
    command += ["--json", str(folder / "bench.json"), "--record", str(folder / "record.jsonl")]
    command += ["--slo-ttft-ms", "2000", "--slo-itl-ms", "50", "--plot", str(folder / "bench.png")]
    subprocess.run(command, check=True)
    record = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    return json.loads((folder / "bench.json").read_text()), record


def check_books(seen: Cluster, record: list[Any], block_bytes: int, outcome: Outcome) -> None:
    """Bytes, cache hits and audits against the record of what was sent."""
    before = {url: metrics(url) for url in seen.prefills + seen.decodes}

    def total(urls: list[str], name: str) -> float:
        return sum(before[url][name] for url in urls)

    cached, landed = (f'pd_prompt_tokens_total{{source="{source}"}}' for source in ("cached", "landed"))
    cached_d, cached_p = total(seen.decodes, cached), total(seen.prefills, cached)
    pages = [-(-row["prompt_tokens"] // PAGE) for row in record]
    decoded = sum(n for n, row in zip(pages, record, strict=True) if row["completion_tokens"] > 1)
    lacked = int(decoded - cached_d / PAGE) * block_bytes
    drained = sum(n for n, row in zip(pages, record, strict=True) if row["completion_tokens"] == 1) * block_bytes
    got = total(seen.decodes, "pd_kv_landed_bytes_total")
    pushed = total(seen.prefills, "pd_kv_pushed_bytes_total")
    outcome.figures |= {
        "prompt_tokens": sum(row["prompt_tokens"] for row in record),
        "cached_tokens_prefill": int(cached_p),
        "cached_tokens_decode": int(cached_d),
        "landed_tokens": int(total(seen.decodes, landed)),
        "landed_bytes": int(got),
        "expected_bytes": lacked,
        "pushed_bytes": int(pushed),
        "loop_lag_p99_ms": max(before[u]['pd_scheduler_loop_lag_seconds{quantile="p99"}'] for u in before) * 1e3,
    }
    outcome.expect(cached_p > 0 and cached_d > 0, f"cache hits: {cached_p} on prefill, {cached_d} on decode")
    outcome.expect(got == lacked, f"{got} bytes landed, the decode instances lacked {lacked}")
    # An answer of one token ends its hand-off early: of those prompts any part may have been sent.
    outcome.expect(got <= pushed <= got + drained, f"{pushed} bytes pushed, {got} landed, {drained} may have drained")
    for url in seen.prefills + seen.decodes:
        books = audit(url)
        outcome.expect(bool(books["balanced"]), f"{url}: {books}")
        outcome.expect(not books["owned"] + books["incoming"] + books["quarantined"], f"{url} holds blocks: {books}")


def check_answers(seen: Cluster, record: list[Any], model: str, share: float, outcome: Outcome) -> None:
    """A sample of the answers against transformers."""
    from tokenizers import Tokenizer

    from tests.oracle import Oracle

    oracle, tokenizer = Oracle(model), Tokenizer.from_file(f"{model}/tokenizer.json")
    sample = record[:: max(1, round(1 / share))]
    worst = 0.0
    for row in sample:
        prompt = row["prompt_token_ids"]
        body = {
            "input_ids": prompt,
            "return_logprob": True,
            "sampling_params": {"max_new_tokens": row["completion_tokens"], "temperature": 0, "ignore_eos": True},
        }
        answer = httpx.post(f"{seen.url}/generate", json=body, timeout=60).json()
        got = answer["meta_info"]["output_token_logprobs"]
        tokens = [token for _, token, _ in got]
        # One pass over prompt and answer: where every token is the best one after what precedes it, the answer is the
        # oracle's own, by induction. Row p judges the token at p + 1.
        judged = oracle.logprobs(prompt + tokens)[len(prompt) - 1 : -1]
        outcome.expect(judged.argmax(-1).tolist() == tokens, f"row {row['row']}: other tokens")
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        outcome.expect(row["output_text"] == text, f"row {row['row']}: {row['output_text']!r} is not {text!r}")
        outcome.expect(len(tokens) == row["completion_tokens"], f"row {row['row']}: {len(tokens)} tokens")
        exact = [float(judged[i, token]) for i, token in enumerate(tokens)]
        worst = max([worst, *(abs(a[0] - b) for a, b in zip(got, exact, strict=True))])
    outcome.figures |= {"sampled_answers": len(sample), "worst_logprob_error": worst}
    outcome.expect(worst <= LOGPROB_TOLERANCE, f"a logprob is off by {worst}")


def replay(
    model: str, trace: Path, rows: int, folder: Path, *, time_scale: float = 1.0, pairs: int = 2, share: float = 0.1
) -> Outcome:
    """Run it all; `share` of the answers is held against transformers."""
    outcome = Outcome()
    config = json.loads(Path(model, "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    block_bytes = config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2 * 4 * PAGE
    with cluster(model, pairs, pairs, folder / "pd-up.log") as seen:
        report, record = run_bench(seen.url, trace, rows, time_scale, folder)
        outcome.figures["bench"] = report
        errors = [row["error"] for row in record if row["error"]]
        outcome.expect(not errors and len(record) == rows, f"{len(errors)} errors: {errors[:3]}")
        if not errors:
            check_books(seen, record, block_bytes, outcome)
            check_answers(seen, record, model, share, outcome)
    return outcome


def main() -> int:
    from pd.rules import builtin_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=builtin_model())
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    outcome = replay(args.model, args.trace, args.rows, args.folder, time_scale=args.time_scale, pairs=args.pairs)
    if args.json:
        args.json.write_text(json.dumps(outcome.figures, indent=2) + "\n")
    print(json.dumps({k: v for k, v in outcome.figures.items() if k != "bench"}, indent=2))
    for problem in outcome.problems:
        print(f"PROBLEM: {problem}")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
