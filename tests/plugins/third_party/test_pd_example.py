"""What pd asks of a backend and of a policy. Each suite is in pd; here is only how to make what it tests."""

from pd_example.sticky import Sticky

from pd.abc import PolicyContext, RoutingPolicy
from pd.testing import (
    NO_AUTHENTICATION,
    NO_DIGESTS,
    NOT_REVOCABLE,
    ONE_THREAD,
    PolicySuite,
    TransferConformance,
)


class TestMemfd(TransferConformance):
    factory = "pd_example.plugin:make_memfd"
    # The package's README says it too.
    exceptions = dict.fromkeys(
        (*NOT_REVOCABLE, *NO_DIGESTS, *ONE_THREAD, *NO_AUTHENTICATION), "plain shared memory knows nobody"
    ) | {
        "test_a_receiver_that_has_closed_is_noticed_quickly_and_takes_nothing_more": "memory that is mapped stays so",
    }


class TestSticky(PolicySuite):
    def make(self, context: PolicyContext) -> RoutingPolicy:
        return Sticky(context)

    def test_the_same_beginning_goes_to_the_same_worker(self) -> None:
        from pd.testing.policy import request, worker

        policy, workers = self.policy(), [worker(name, busy) for busy, name in enumerate("abcd")]
        first = policy.choose(request(1, "x" * 300), workers)
        assert policy.choose(request(2, "x" * 256 + "another end"), workers[::-1]) is first
