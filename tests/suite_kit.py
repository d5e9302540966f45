"""Some tests of a conformance suite by themselves: the whole suite is for `make test-all`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from pd.testing import TransferConformance

#: The most telling tests of every backend.
SHORT = (
    "test_scattered_writes_of_all_sizes_arrive_whole_and_nothing_else_changes",
    "test_an_address_outside_a_region_is_refused_and_touches_nothing",
    "test_a_damaged_descriptor_is_refused_and_a_good_one_still_works",
    "test_a_peer_without_the_secret_is_refused",
    "test_after_reset_no_reused_source_byte_reaches_a_frozen_receiver",
    "test_a_receiver_killed_in_the_middle_is_noticed_quickly",
    "test_a_dead_sender_can_be_expelled",
)


def in_short(tests: Mapping[type[TransferConformance], Sequence[str]]) -> pytest.MarkDecorator:
    """Calls a test with each of these classes and each of its tests' names, for `run_alone`."""
    return pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in tests.items() for name in names])


def run_alone(kind: type[TransferConformance], name: str) -> None:
    suite = kind()
    method = getattr(suite, name)
    suite.setup_method(method)
    try:
        method()
    finally:
        suite.teardown_method(method)
