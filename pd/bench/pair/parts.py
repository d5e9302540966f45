"""What is measured already: one JSON file for each step, and the one document that they make together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd.bench.pair import curves


class Parts:
    """A folder of `STEP.json`, each with the key of what it was measured with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, key: str | None = None) -> dict[str, Any] | None:
        """The part, if it is there and, with a key, was measured in that way and did not fail."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        part: dict[str, Any] = json.loads(path.read_text())
        return part if key is None or (part["key"] == key and "problem" not in part) else None

    def put(self, part: Part) -> None:
        """In one piece: a run that is cut off leaves whole parts only."""
        path = self._folder / f"{part.name}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**vars(part), "result": None, **part.result}, indent=1) + "\n")
        new.replace(path)

    def all(self, deployment: str) -> list[dict[str, Any]]:
        """Those of this deployment: what a rehearsal left in the folder is none of it."""
        found = [json.loads(path.read_text()) for path in sorted(self._folder.glob("*.json"))]
        return [part for part in found if part["deployment"] == deployment]


@dataclass(frozen=True)
class Part:
    """`commands`: how what was measured was started. `result` becomes the file's own fields, or is `problem` alone."""

    name: str
    phase: str
    key: str
    deployment: str
    date: str
    device: str
    transfer: str
    visible: bool
    commands: Sequence[str]
    result: Mapping[str, Any]


def of_phase(parts: Sequence[Mapping[str, Any]], *phases: str) -> list[Mapping[str, Any]]:
    """Those that were measured; one that failed has no figures."""
    return [part for part in parts if part["phase"] in phases and "problem" not in part]


def merge(parts: Sequence[Mapping[str, Any]], command: str, left_out: Mapping[str, str]) -> dict[str, Any]:
    """The document. Rates in GB/s (10^9 bytes), times in ms, shares from 0 to 1."""
    points = [without(part) for part in of_phase(parts, "load")]
    compared = curves.compare(points)
    traces = [without(part) for part in of_phase(parts, "trace")]
    copies = of_phase(parts, "copy")
    copy_gbps = copies[0]["copy_gbps"] if copies else None
    pushes = {named(part): part for part in of_phase(parts, "push")}
    devices, dates = ({part[name]: None for part in parts} for name in ("device", "date"))
    return {
        "device": "; ".join(devices),
        "date": ", ".join(dates),
        "command": command,
        "copy_gbps": copy_gbps,
        "direct_alone_gbps": copies[0]["direct_alone_gbps"] if copies else None,
        "push_gbps": {name: _each(part, "fresh", "gbps") for name, part in pushes.items()},
        "push_cached_gbps": {name: _each(part, "cached", "gbps") for name, part in pushes.items()},
        "push_of_copy": {name: _each(part, "fresh", "gbps", copy_gbps) for name, part in pushes.items()},
        "after_compute_ms": {name: _each(part, "fresh", "after_compute_ms") for name, part in pushes.items()},
        "after_first_ms": {name: _each(part, "fresh", "after_first_ms") for name, part in pushes.items()},
        "second_token_ms": {name: _each(part, "fresh", "second_token_ms") for name, part in pushes.items()},
        "second_token_share": {name: _each(part, "fresh", "share") for name, part in pushes.items()},
        "verify": {named(part): without(part) for part in of_phase(parts, "verify")},
        **compared,
        "chunks": {system: [p["chunk"] for p in points if p["system"] == system][:1] for system in ("pd", "unified")},
        "curves": points,
        "tuning": [without(part) for part in of_phase(parts, "tune")],
        "trace": traces,
        "trace_unified_wins": curves.compare(traces)["unified_wins"],
        "kill": {part["victim"]: without(part) for part in of_phase(parts, "kill")},
        "failed": {part["name"]: part["problem"] for part in parts if "problem" in part},
        "not_measured": dict(left_out),
        "commands": {part["name"]: part["commands"] for part in parts},
    }


def named(part: Mapping[str, Any]) -> str:
    return f"{part['transfer']}, CUDA_VISIBLE_DEVICES" if part["visible"] else str(part["transfer"])


def without(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part's figures alone."""
    about = ("key", "deployment", "phase", "commands", "name", "date", "device", "visible", "result")
    return {name: value for name, value in part.items() if name not in about}


def _each(part: Mapping[str, Any], form: str, figure: str, by: float | None = 1.0) -> dict[str, float]:
    """By prompt length."""
    if by is None:
        return {}
    return {length: round(found[form][figure] / by, 4) for length, found in part["lengths"].items()}
