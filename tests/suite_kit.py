"""Conformance suites of many backends: what those of the vendors' add, and some tests by themselves.

`make test` runs one suite whole, that of `direct` as it comes, and of every other the most telling tests. The whole
suites are for `make test-all`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from pd.errors import PeerLost
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

#: Those of a backend that knows single hand-offs.
SHORT_REVOCABLE = (
    *SHORT,
    "test_only_what_is_granted_lands",
    "test_after_a_revoke_nothing_of_the_hand_off_lands",
    "test_a_frozen_sender_does_not_hold_up_revoke_or_expel",
    "test_the_digests_of_a_landing_are_those_of_its_blocks",
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


class LosesWhoHangs(TransferConformance):
    def test_a_receiver_that_hangs_when_it_is_connected_to_is_lost_in_time(self) -> None:
        remote = self.remote("there")
        descriptor = remote.call("descriptor")
        remote.freeze()
        with pytest.raises(PeerLost):
            self.bounded("connect", lambda: self.here.connect(descriptor))


class EndsEngines(TransferConformance):
    """`engine`: the attribute of a peer that holds what reads local memory for it."""

    engine: ClassVar[str]

    def test_a_reset_destroys_the_engine_before_the_receiver_is_told(self) -> None:
        self.connected("there")
        peer: Any = self.here._peers["there"]
        engine, close, left = weakref.ref(getattr(peer, self.engine)), peer.call.close, []

        def told() -> None:
            left.append(engine())
            close()

        peer.call.close = told
        self.here.reset_peer("there")
        assert left == [None]

    def test_a_sender_that_connects_again_ends_its_earlier_connection_and_no_other(self) -> None:
        remote = self.connected("there")
        first: Any = self.here._peers["there"]
        self.connect(remote)
        self.until(lambda: first.call.end)
        with pytest.raises(PeerLost):
            self.here.backend.post(first, np.array(self.rows([(0, 1)]), np.uint64), 1)
        self.works(remote)
        self.here.backend.reset_peer(first)
        self.works(remote)
