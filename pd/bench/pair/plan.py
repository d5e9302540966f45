"""What is measured, in which order, on which instances: fixed before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pd.bench.pair.options import Options

#: The two systems that are compared: one prefill and one decode instance, or two that do both.
SYSTEMS = ("unified", "pd")

#: Seconds that starting instances is expected to take, and some steps beside the load that they send.
START, COPY, VERIFY, PUSH, DRAIN = 40.0, 45.0, 75.0, 40.0, 20.0

#: Shares of a GPU's memory where several instances are on it.
HALF, REFERENCE, BESIDE_REFERENCE = 0.42, 0.2, 0.31

#: Which settings a step's result depends on, besides those of every step.
_OF_ALL = ("model", "shape", "device", "one_gpu", "serve_flags")
_OF_LOAD = ("unified_policy", "input_len", "output_len", "seconds", "slo_ttft_ms", "slo_itl_ms", "request_timeout")
_OF_PHASE: dict[str, tuple[str, ...]] = {
    "copy": ("copy_bytes",),
    "verify": ("verify_only",),
    "push": ("prompts", "repeats"),
    "tune": _OF_LOAD,
    "load": _OF_LOAD,
    "trace": ("unified_policy", "trace", "rows", "length_scale", "slo_ttft_ms", "slo_itl_ms", "request_timeout"),
    "kill": (*_OF_LOAD, "kill_seconds", "down"),
}


@dataclass(frozen=True)
class Instance:
    """One `pd serve`. `share`: of its GPU's memory, where others are on it; 0: what is free. `chunk` 0: the default.

    `visible`: it gets its GPU by CUDA_VISIBLE_DEVICES instead of --base-gpu-id.
    """

    name: str
    role: str
    gpu: int
    transfer: str = ""
    visible: bool = False
    chunk: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Setup:
    """What has to be running: instances, in the order in which they start, and a router before those in `routed`."""

    instances: tuple[Instance, ...]
    routed: tuple[str, ...]
    policy: str = ""  # of the router for decode and unified instances; "": the default


@dataclass(frozen=True)
class Step:
    """One thing that is measured at a time; its result is one part. `seconds` is what it is expected to take.

    `system` and `chunk` say what bears the load, `rate` (requests/s) or `time_scale` how much; `victim` is killed.
    """

    phase: str
    name: str
    seconds: float
    transfer: str = ""
    visible: bool = False
    system: str = "pd"
    chunk: int = 0
    rate: float = 0.0
    seed: int = 0
    time_scale: float = 0.0
    victim: str = ""


def plan(options: Options, installed: Sequence[str], chunks: Mapping[str, int]) -> list[Step]:
    """Every step of the chosen phases, in order. `chunks`: each system's best chunk size, where it is known.

    The load's backend is the first of `installed`.
    """
    steps: list[Step] = []
    only = options.only
    if "copy" in only:
        steps.append(Step("copy", "copy", COPY))
    forms = [(name, False) for name in options.transfers if name in installed]
    if forms and options.device == "cuda":
        forms.insert(1, (forms[0][0], True))
    for name, visible in forms:
        suffix = f"{name}-visible" if visible else name
        for phase, seconds in (("verify", VERIFY), ("push", PUSH)):
            if phase in only:
                steps.append(Step(phase, f"{phase}-{suffix}", seconds, name, visible))
    transfer = forms[0][0] if forms else ""
    for system in SYSTEMS:
        steps += _load_steps(options, system, transfer, chunks.get(system, 0))
    if "kill" in only:
        for victim in ("prefill", "decode"):
            seconds = options.kill_seconds + START
            steps.append(
                Step("kill", f"kill-{victim}", seconds, transfer, chunk=chunks.get("pd", 0), rate=options.kill_rate,
                     seed=300, victim=victim)
            )  # fmt: skip
    return steps


def _load_steps(options: Options, system: str, transfer: str, chunk: int) -> list[Step]:
    steps = []
    one: dict[str, Any] = {"transfer": transfer if system == "pd" else "", "system": system}
    if "tune" in options.only and len(options.chunk_sizes) > 1:
        for size in options.chunk_sizes:
            seconds = options.seconds + DRAIN
            steps.append(Step("tune", f"tune-{system}-{size}", seconds, chunk=size, rate=options.tune_rate, seed=100,
                              **one))  # fmt: skip
    if "load" in options.only:
        for index, rate in enumerate(options.rates):
            seconds = options.seconds + DRAIN
            steps.append(Step("load", f"load-{system}-{rate:g}", seconds, chunk=chunk, rate=rate, seed=200 + index,
                              **one))  # fmt: skip
    if "trace" in options.only and options.trace is not None:
        for index, scale in enumerate(options.time_scales):
            seconds = TRACE_SECONDS_A_ROW * options.rows * scale + DRAIN
            steps.append(Step("trace", f"trace-{system}-{scale:g}", seconds, chunk=chunk, time_scale=scale,
                              seed=400 + index, **one))  # fmt: skip
    return steps


#: The conversation trace has 3.4 requests a second.
TRACE_SECONDS_A_ROW = 0.3


def left_out(options: Options, unusable: Mapping[str, str]) -> dict[str, str]:
    """What was asked for and cannot be measured here, and why. `unusable`: reasons by backend."""
    found = {f"transfer {name}": reason for name, reason in unusable.items()}
    if "trace" in options.only and options.trace is None:
        found["trace"] = "no --trace FILE was given"
    if options.device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = "no GPU"
    return found


def setup_of(step: Step, options: Options) -> Setup | None:
    """What has to run for this step; None: nothing may."""
    if step.phase == "copy":
        return None
    first, second = options.gpus
    same = first == second
    if step.system == "unified":
        share = HALF if same else 0.0
        pair = [Instance(f"unified-{i}", "unified", gpu, chunk=step.chunk, share=share) for i, gpu in
                enumerate((first, second))]  # fmt: skip
        return _shared(options, pair, options.unified_policy)
    # The reference stays where it is while pushes are measured, idle: a restart would cost more than it disturbs.
    reference = step.phase in ("verify", "push") and "verify" in options.only
    share = BESIDE_REFERENCE if reference else HALF
    others = [Instance("reference", "unified", first, share=REFERENCE)] if reference else []
    pair = [
        Instance("decode", "decode", second, step.transfer, step.visible, 0, share if same else 0.0),
        Instance(
            "prefill", "prefill", first, step.transfer, step.visible, step.chunk, share if same or reference else 0.0
        ),
    ]
    return _shared(options, [*others, *pair])


def _shared(options: Options, instances: list[Instance], policy: str = "") -> Setup:
    """Without shares where the pool's size is said otherwise."""
    if options.device == "cpu" or {"--max-total-tokens", "--mem-fraction-static"} & set(options.serve_flags):
        instances = [Instance(**{**asdict(one), "share": 0.0}) for one in instances]
    routed = tuple(one.name for one in instances if one.name != "reference")
    return Setup(tuple(instances), routed, policy)


def fraction(setup: Setup, name: str) -> float:
    """--mem-fraction-static of an instance: its share by what those before it on the same GPU leave free; 0: none."""
    taken: dict[int, float] = {}
    for one in setup.instances:
        if one.name == name:
            return round(one.share / (1 - taken.get(one.gpu, 0.0)), 3)
        taken[one.gpu] = taken.get(one.gpu, 0.0) + one.share
    raise KeyError(name)


def deployment_of(options: Options) -> str:
    """Equal where parts may stand in one document."""
    return _hash({name: getattr(options, name) for name in _OF_ALL})


def key_of(step: Step, options: Options) -> str:
    """Equal where a part would be measured in the same way."""
    names = _OF_ALL + _OF_PHASE[step.phase]
    settings: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(options) if f.name in names}
    return _hash([settings, {**asdict(step), "seconds": 0}])


def _hash(what: Any) -> str:
    return hashlib.blake2b(json.dumps(what, default=str).encode(), digest_size=8).hexdigest()
