"""Some tests of a conformance suite by themselves: the whole suite is for `make test-all`."""

from __future__ import annotations

from pd.testing import TransferConformance


def run_alone(kind: type[TransferConformance], name: str) -> None:
    suite = kind()
    method = getattr(suite, name)
    suite.setup_method(method)
    try:
        method()
    finally:
        suite.teardown_method(method)
