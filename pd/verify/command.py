"""One verification, from resolved options to an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pd.errors import ConfigError, PdError
from pd.models.kv_cache import FP8_E4M3
from pd.verify.client import Answer, AskFailed, Server
from pd.verify.compare import Divergence, Output, Rule, Verdict, compare
from pd.verify.options import TRANSFORMERS, Options
from pd.verify.workload import Case, Facts, workload

#: (case, the deployment's outputs) -> what they ought to be. Raises AskFailed.
Judge = Callable[[Case, list[Output]], list[Output]]

#: How often everything is asked: name -> requests at once.
ROUNDS = {"one by one": 1, "all at once": 32}
_DEFAULT_PAGE = 32
#: How far logprobs may be from those in float32. The significand of bfloat16 has three bits less than float16's. Keys
#: and values in FP8 are rounded by the reference, too, but those between two numbers now and then to the other one.
_NOISE = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5, FP8_E4M3: 0.05}


@dataclass(frozen=True)
class Finding:
    """One case in one round. `status`: equal | tie | differs | failed | skipped."""

    case: str
    round: str
    status: str
    worst: float = 0.0
    detail: str = ""
    prefill: str = ""


def run_verify(options: Options) -> int:
    """0 when everything that could be compared is equal, else 1. Raises ConfigError, or PdError for a dead server."""
    console = Console(stderr=True)
    server = Server(options.url, options.timeout_s, options.api_key)
    facts, dtypes, path = _discover(server)
    cases = [case for case in workload(facts, options.seed) if options.only in case.name]
    if not cases:
        raise ConfigError("--only", f"no request has {options.only!r} in its name")
    judge = _judge(options, path, FP8_E4M3 if FP8_E4M3 in dtypes else "auto")
    rule = rule_for(dtypes, options.tolerance)
    reference = "transformers in float32" if options.reference == TRANSFORMERS else options.reference
    console.print(
        f"{options.url} against {reference}: {len(cases)} requests, {' and '.join(ROUNDS)}; logprobs within "
        f"{rule.tolerance:g}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    findings = []
    for round, at_once in ROUNDS.items():
        answers = server.ask_all(cases, at_once)
        for case, answer in zip(cases, answers, strict=True):
            findings.append(_finding(case, round, answer, judge, rule))
    _report(findings, options)
    return 1 if any(finding.status in ("differs", "failed") for finding in findings) else 0


def rule_for(dtypes: Collection[str], tolerance: float | None) -> Rule:
    """By the coarsest of the deployment's types; `tolerance` is what the user asked for."""
    coarse = max((_NOISE.get(dtype, 0.5) for dtype in dtypes), default=1e-4)
    return Rule(coarse if tolerance is None else tolerance, exact_draws=set(dtypes) <= {"float32"})


def _finding(case: Case, round: str, answer: Answer | AskFailed, judge: Judge, rule: Rule) -> Finding:
    if isinstance(answer, AskFailed):
        return Finding(case.name, round, "skipped" if answer.unsupported else "failed", detail=str(answer))
    try:
        want = judge(case, answer.outputs)
    except AskFailed as error:
        detail = f"the reference: {error}"
        return Finding(case.name, round, "skipped" if error.unsupported else "failed", detail=detail)
    verdicts = compare(answer.outputs, want, rule, sampled=case.sampled)
    worst = max((verdict.worst for verdict in verdicts), default=0.0)
    found = first_divergence(verdicts)
    if found is not None:
        return Finding(case.name, round, "differs", worst, str(found), answer.prefill)
    ties = [verdict.tie for verdict in verdicts if verdict.tie is not None]
    if ties:
        detail = f"two tokens are equally likely at output position {min(ties)}: compared up to there"
        return Finding(case.name, round, "tie", worst, detail, answer.prefill)
    return Finding(case.name, round, "equal", worst, prefill=answer.prefill)


def first_divergence(verdicts: list[Verdict]) -> Divergence | None:
    """Of all choices the one that parts first."""
    found = [verdict.divergence for verdict in verdicts if verdict.divergence is not None]
    return min(found, key=lambda divergence: (divergence.position, divergence.choice), default=None)


def _judge(options: Options, path: str, kv_cache_dtype: str) -> Judge:
    if options.reference == TRANSFORMERS:
        directory = options.model or Path(path)
        if not directory.is_dir():
            problem = f"the deployment's model, {path!r}, is not on this machine"
            raise ConfigError("--model", problem, "give its directory, or --reference URL of a unified instance")
        from pd.verify.oracle import Oracle

        return Oracle(directory, kv_cache_dtype).judge
    server = Server(options.reference, options.timeout_s, options.api_key)
    known: dict[str, list[Output]] = {}

    def judge(case: Case, outputs: list[Output]) -> list[Output]:
        if case.name not in known:
            known[case.name] = server.ask(case).outputs
        return known[case.name]

    role = _get(server, "/server_info").get("role")
    if role == "prefill":
        raise ConfigError("--reference", f"{options.reference} is a prefill instance", "name a unified one")
    return judge


def _discover(server: Server) -> tuple[Facts, set[str], str]:
    """(sizes, types of weights and KV, the model's directory). Raises PdError when nobody can be asked."""
    model = _get(server, "/model_info")
    info = _get(server, "/server_info")
    if info.get("role") == "prefill":
        raise ConfigError("URL", f"{server.url} is a prefill instance", "name the router or a decode instance")
    workers = [info, *(info.get("decode") or ()), *(info.get("prefill") or ())]
    workers = [worker for worker in workers if isinstance(worker, dict)]
    pages = [worker["page_size"] for worker in workers if worker.get("page_size")]
    dtypes = {str(worker[kind]) for worker in workers for kind in ("dtype", "kv_cache_dtype") if worker.get(kind)}
    try:
        facts = Facts(
            vocab_size=int(model["vocab_size"]),
            context_length=int(model["max_model_len"]),
            page_size=int(pages[0]) if pages else _DEFAULT_PAGE,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PdError(f"{server.url} is no deployment of pd: /model_info lacks {error}") from error
    return facts, dtypes, str(model.get("model_path", ""))


def _get(server: Server, path: str) -> dict[str, Any]:
    try:
        return server.get(path)
    except AskFailed as error:
        raise PdError(f"no answer to compare: {error}") from error


def _report(findings: list[Finding], options: Options) -> None:
    table = Table("request", *ROUNDS, "largest difference", box=None)
    by_case: dict[str, list[Finding]] = {}
    for finding in findings:
        by_case.setdefault(finding.case, []).append(finding)
    colours = {"equal": "green", "tie": "green", "skipped": "yellow"}
    for name, rounds in by_case.items():
        cells = [f"[{colours.get(f.status, 'red')}]{f.status}[/]" for f in rounds]
        table.add_row(name, *cells, f"{max(f.worst for f in rounds):.1e}")
    out = Console()
    out.print(table)
    for status in ("skipped", "tie", "failed", "differs"):
        for finding in findings:
            if finding.status == status:
                text = f"{status}: {finding.case} ({finding.round}): {finding.detail}"
                out.print(text, markup=False, highlight=False, soft_wrap=True)
    remote = sum(bool(finding.prefill) for finding in findings)
    answered = sum(finding.status in ("equal", "tie", "differs") for finding in findings)
    counts = {s: sum(f.status == s for f in findings) for s in ("equal", "tie", "differs", "failed", "skipped")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    out.print(
        f"{said}; {remote} of {answered} answers had their prompt computed by a prefill instance",
        markup=False,
        soft_wrap=True,
    )
    first = next((finding for finding in findings if finding.status == "differs"), None)
    if first is not None:
        text = f"first divergence: {first.case} ({first.round}): {first.detail}"
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    if options.json_path is not None:
        document = {"url": options.url, "reference": options.reference, "seed": options.seed, **counts}
        document["first_divergence"] = asdict(first) if first is not None else None
        document["findings"] = [asdict(finding) for finding in findings]
        options.json_path.write_text(json.dumps(document, indent=2) + "\n")
