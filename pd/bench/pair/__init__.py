"""`pd bench pair`: prefill on one GPU, decode on another of the same host, beside two instances that do both.

Imports of numpy, rich and the client wait until `run`, so that `pd --help` stays fast.
"""

from __future__ import annotations

import argparse

from pd.bench.pair.options import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Measure what `args` asks for. Exit code: 0 all is measured, 1 a step failed, 3 the time limit came first.

    Raises pd.errors.ConfigError (exit code 2) for bad arguments.
    """
    from pd.bench.pair.command import run_bench
    from pd.bench.pair.options import resolve

    return run_bench(resolve(args))
