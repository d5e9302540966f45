"""`python -m pd.bench.serve`: the same command without the `pd` program."""

from __future__ import annotations

import argparse
import sys

from pd.bench.serve import add_arguments, run
from pd.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pd bench serve", description="Open-loop load on an OpenAI-compatible URL.")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ConfigError as error:
        print(f"pd bench serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
