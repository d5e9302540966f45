"""`pd bench serve`: open-loop load on any OpenAI-compatible URL.

Imports of numpy, rich and the client wait until `run`, so that `pd --help` stays fast.
"""

from __future__ import annotations

import argparse

from pd.bench.serve.options import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Run the load that `args` describes. Exit code: 0 done, 1 every request failed, 130 interrupted.

    Raises pd.errors.ConfigError (exit code 2) for bad arguments.
    """
    from pd.bench.serve.command import run_bench
    from pd.bench.serve.options import resolve

    return run_bench(resolve(args))
