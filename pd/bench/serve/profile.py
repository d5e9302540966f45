"""SGLang's benchmark flags for profiling: the instances behind the URLs record while the load runs.

With `--pd-separated` those of one leg, prefill or decode, are asked by their own URLs; without it the target is. Each
writes its trace on its own host.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

from pd.bench.serve.flags import base_url, flag_of
from pd.errors import ConfigError

ACTIVITIES = ("CPU", "GPU")
STAGES = ("prefill", "decode")

#: Steps of each stage where SGLang's clients name none.
_STAGE_STEPS = 5


@dataclass(frozen=True)
class ProfileOptions:
    """`urls`: (what it is, base URL) of each instance that records. `body`: of /start_profile."""

    urls: tuple[tuple[str, str], ...]
    body: dict[str, Any]


def add_profile_arguments(profile: argparse._ArgumentGroup) -> None:
    profile.add_argument("--profile", action="store_true", help="torch profile of what serves the load")
    profile.add_argument(
        "--pd-separated", action="store_true", help="profile the instances of one leg by their URLs, not the target"
    )
    for leg in ("prefill", "decode"):
        help = f"{leg} instances to profile; legs are profiled in runs of their own"
        profile.add_argument(f"--profile-{leg}-url", nargs="+", metavar="URL", help=help)
    profile.add_argument("--profile-activities", nargs="+", choices=ACTIVITIES, help="default: what there is")
    profile.add_argument("--profile-start-step", type=int, metavar="N", help="begin with the instance's step N")
    profile.add_argument(
        "--profile-num-steps",
        "--profile-steps",
        type=int,
        metavar="N",
        help="end after so many steps (default: load)",
    )
    profile.add_argument("--profile-by-stage", action="store_true", help="prefill and decode steps in a trace each")
    profile.add_argument("--profile-stages", nargs="+", choices=STAGES, help="only these of them")
    profile.add_argument("--profile-output-dir", metavar="DIR", help="on its host (default: its --profile-dir)")
    profile.add_argument("--profile-prefix", help="begins the names of the files")


def resolve_profile(args: argparse.Namespace, url: str) -> ProfileOptions | None:
    """None without --profile, without which no other flag acts. Raises ConfigError naming the flag."""
    if not args.profile:
        for name, value in vars(args).items():
            if name.startswith(("profile_", "pd_separated")) and value is not None and value is not False:
                raise ConfigError(flag_of(name), "acts on a profile only", "add --profile")
        return None
    legs = [leg for leg in ("prefill", "decode") if getattr(args, f"profile_{leg}_url")]
    if len(legs) > 1:
        raise ConfigError("--profile-decode-url", "each leg is profiled in a run of its own", "give one")
    if args.pd_separated and not legs:
        raise ConfigError("--pd-separated", "no instance is named", "add --profile-prefill-url or --profile-decode-url")
    if legs and not args.pd_separated:
        raise ConfigError(f"--profile-{legs[0]}-url", "the target itself is profiled", "add --pd-separated")
    if args.profile_stages and not args.profile_by_stage:
        raise ConfigError("--profile-stages", "acts on traces by stage only", "add --profile-by-stage")
    urls = [(leg, base_url(f"--profile-{leg}-url", one)) for leg in legs for one in getattr(args, f"profile_{leg}_url")]
    return ProfileOptions(tuple(urls) or (("target", url),), _body(args))


def _body(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("profile_start_step", "profile_num_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(flag_of(name), f"{value} is less than 1")
    folder = args.profile_output_dir
    body = {
        "activities": args.profile_activities,
        "num_steps": args.profile_num_steps or (_STAGE_STEPS if args.profile_by_stage else None),
        "start_step": args.profile_start_step,
        "profile_by_stage": args.profile_by_stage or None,
        "profile_stages": args.profile_stages,
        "output_dir": os.path.abspath(folder) if folder else None,
        "profile_prefix": args.profile_prefix,
    }
    return {name: value for name, value in body.items() if value is not None}
