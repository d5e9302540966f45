"""What `pd verify` was asked to do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pd.errors import ConfigError

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Options:
    """`reference` is a URL or "transformers"; `tolerance` None means: by the precision of the deployment's weights."""

    url: str
    reference: str
    model: Path | None
    tolerance: float | None
    seed: int
    only: str
    timeout_s: float
    json_path: Path | None
    api_key: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", metavar="URL", help="the deployment: a router or an instance")
    add(
        "--reference",
        default=TRANSFORMERS,
        metavar="URL|transformers",
        help="what is right: a unified instance of the same model, or transformers in float32 here (default)",
    )
    add("--model", metavar="DIR", help="the model's directory for transformers (default: where the deployment has it)")
    add(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference of two logprobs (default: 1e-4 for float32 weights, 0.1 for float16, 0.5 for "
        "bfloat16; 0.05 at least for KV in fp8_e4m3)",
    )
    add("--seed", type=int, default=0, help="of the prompts (default: 0)")
    add("--only", default="", metavar="TEXT", help="only requests whose name contains TEXT")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds that one request may take (default: 120)")
    add("--json", metavar="F", help="write the findings to F")
    add(
        "--api-key",
        metavar="KEY",
        help="sent as a bearer token to the deployment and to a reference URL (default: PD_API_KEY)",
    )


def resolve(args: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    """Raises ConfigError naming the argument at fault."""
    url = _url("URL", args.url)
    reference = args.reference
    if reference != TRANSFORMERS:
        reference = _url("--reference", reference)
        if args.model is not None:
            raise ConfigError("--model", "is read by transformers only", "leave it out, or leave out --reference")
    if args.model is not None and not Path(args.model).is_dir():
        raise ConfigError("--model", f"{args.model} is not a directory")
    if args.tolerance is not None and not 0 < args.tolerance < 10:
        raise ConfigError("--tolerance", f"must lie between 0 and 10, got {args.tolerance}")
    if not 0 < args.timeout < 1e6:
        raise ConfigError("--timeout", f"must be a positive number of seconds, got {args.timeout}")
    return Options(
        url=url,
        reference=reference,
        model=Path(args.model) if args.model is not None else None,
        tolerance=args.tolerance,
        seed=args.seed,
        only=args.only,
        timeout_s=args.timeout,
        json_path=_writable(args.json),
        api_key=environ.get("PD_API_KEY", "") if args.api_key is None else args.api_key,
    )


def _writable(text: str | None) -> Path | None:
    """Checked at the beginning, so that a long run does not end without its result."""
    if text is None:
        return None
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError("--json", f"cannot write {text!r}", "name a file in a folder that exists")
    return path


def _url(name: str, text: str) -> str:
    text = text if "://" in text else f"http://{text}"
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(name, f"must be an http or https URL, got {text!r}")
    return text.rstrip("/")
