"""`pd verify`: asks a deployment for everything that pd can do and compares each token and logprob with a reference.

The reference is another deployment (usually one `unified` instance) or transformers in float32 on this machine. Text
hides damage: one wrong row of KV often changes no greedy token. So every request asks for logprobs, and the first
position at which they differ says which part of the system to look at.
"""

from __future__ import annotations

import argparse
import os

from pd.verify.options import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 everything equal, 1 something differs or failed. Raises pd.errors.ConfigError for bad arguments."""
    from pd.verify.command import run_verify
    from pd.verify.options import resolve

    return run_verify(resolve(args, os.environ))
