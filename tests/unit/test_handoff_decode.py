"""The decode side of the hand-off, one scenario per test."""

from __future__ import annotations

import pytest

from pd import messages as m
from pd.scheduler import actions as act
from pd.scheduler.handoff import (
    DECODE_TABLE,
    AttemptFailed,
    ChoiceKind,
    DecodeState,
    FirstTokenCame,
    GrantReturned,
    HandoffConfig,
    Ready,
)
from pd.scheduler.handoff_base import Table, first_counter, ints
from pd.types import HandoffId, InstanceState, Load
from tests.handoff_kit import P0, P1, Decode, first_token, identity


def asked(credit: int = 100, **changes: object) -> tuple[Decode, int, HandoffId]:
    d = Decode()
    session = d.connect(credit=credit)
    d.orders()
    return d, session, d.ask(**changes)  # type: ignore[arg-type]


def test_every_state_and_event_of_the_decode_table_is_defined() -> None:
    assert DECODE_TABLE.undefined() == []


def test_a_pair_that_is_named_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="defined twice"):
        Table.build(
            DecodeState, type(next(iter(DECODE_TABLE.rows))[1]), {DecodeState.ASKED: {"LEFT": "a", "LEFT LOST": "b"}}
        )


# --- the way that goes well ---


def test_the_grant_reaches_the_own_runner_before_the_question_reaches_the_peer() -> None:
    d, session, id = asked()
    grant, prefill = d.orders()
    assert isinstance(grant, act.Transfer) and isinstance(grant.command, m.TransferGrant)
    assert (grant.command.sender, grant.command.tag) == ("p0.1.0", id.tag)
    assert isinstance(prefill, act.SendPeer) and prefill.session == session
    dest = prefill.message.dests[0]
    assert dest.blocks_i32 == grant.command.blocks_i32
    assert ints(dest.generations_i32) == [d.pool.generation[b] for b in ints(dest.blocks_i32)]
    assert prefill.message.remaining_ms == 1_000_000
    assert d.counts() == (17, 3, 0)


def test_a_first_token_is_handed_on_before_anything_has_landed() -> None:
    d, session, id = asked()
    d.said(session, first_token(id, 42))
    (notice,) = d.notices
    assert isinstance(notice, FirstTokenCame) and notice.message.choices[0].token == 42


def test_ready_only_after_landing_fence_and_digest() -> None:
    d, session, id = asked(tokens=10)
    d.orders()
    d.said(session, first_token(id))
    d.landed(session, id)
    assert not any(isinstance(n, Ready) for n in d.notices)
    orders = d.orders()
    (verify,) = d.commands(orders)
    assert isinstance(verify, m.TransferVerify) and ints(verify.tokens_i32) == [4, 4, 2]
    assert [type(x) for x in d.sent(orders)] == [m.LandedAck]
    d.verified(id)
    (ready,) = d.notices
    assert isinstance(ready, Ready) and ready.blocks == ints(verify.blocks_i32)
    assert [d.pool.digest[b] for b in ready.blocks] == [0, 1, 2]
    assert [d.pool.refs(b) for b in ready.blocks] == [1, 1, 1]
    assert d.counts() == (17, 0, 0) and d.machine.quiet
    assert d.commands() == [m.TransferRevoke("p0.1.0", id.tag, over=True)], "the runner forgets the grant"
    assert d.machine.outcomes == {"landed": 1} and d.machine.landed_bytes == 64


def test_a_digest_mismatch_frees_the_blocks_and_asks_for_another_attempt() -> None:
    d, session, id = asked()
    d.said(session, first_token(id))
    d.landed(session, id)
    _ = d.notices
    d.verified(id, bad=(3,))
    (failed,) = d.notices
    assert isinstance(failed, AttemptFailed) and failed.retryable and failed.reason == "digest mismatch"
    assert d.counts() == (20, 0, 0) and d.machine.outcomes == {"digest_mismatch": 1}


def test_a_fence_that_failed_is_no_landing() -> None:
    d, session, id = asked()
    d.said(session, first_token(id))
    d.landed(session, id)
    d.verified(id, error="the device is gone")
    failed = d.notices[-1]
    assert isinstance(failed, AttemptFailed) and failed.reason == "the device is gone"
    assert d.counts() == (20, 0, 0)


def test_a_landed_for_blocks_that_changed_their_owner_is_no_landing() -> None:
    d, session, id = asked()
    d.said(session, first_token(id))
    d.landed(session, id)
    d.pool.generation[next(iter(d.machine.audit().incoming))] += 1
    d.verified(id)
    assert isinstance(d.notices[-1], AttemptFailed)


def test_several_sending_ranks_must_all_land_and_their_digests_add_up() -> None:
    d = Decode()
    session = d.connect(ranks=2)
    id = d.ask()
    assert [c.sender for c in d.commands() if isinstance(c, m.TransferGrant)] == ["p0.1.0", "p0.1.1"]
    d.said(session, first_token(id))
    d.landed(session, id, rank=0)
    assert not d.commands()
    d.landed(session, id, rank=1)
    assert [c.sender for c in d.commands() if isinstance(c, m.TransferVerify)] == ["p0.1.0", "p0.1.1"]
    _ = d.notices
    d.verified(id, sender="p0.1.0")
    assert not d.notices
    d.verified(id, sender="p0.1.1", digests_u64=b"".join(v.to_bytes(8, "little") for v in (0, 2, 4)))
    (ready,) = d.notices
    assert isinstance(ready, Ready) and [d.pool.digest[b] for b in ready.blocks] == [0, 2, 4]


# --- choosing ---


def test_the_preferred_prefill_is_waited_for_while_it_is_dialled() -> None:
    d = Decode()
    d.connect(P1, "p1")
    choice = d.machine.choose(0.0, [P0, P1], 10)
    assert choice.kind is ChoiceKind.WAIT
    d.machine.session_refused(0.0, P0, "no answer")
    assert d.machine.choose(0.0, [P0, P1], 10).endpoint == P1


def test_an_unreachable_prefill_is_not_dialled_again_before_its_back_off() -> None:
    d = Decode()
    d.machine.choose(0.0, [P0], 10)
    d.machine.session_refused(0.0, P0, "no answer")
    d.orders()
    choice = d.machine.choose(0.1, [P0], 10)
    assert choice.kind is ChoiceKind.NONE and "no answer" in choice.reason and not d.orders()
    assert d.machine.choose(0.6, [P0], 10).kind is ChoiceKind.WAIT
    assert isinstance(d.orders()[0], act.OpenSession)


def test_a_mismatch_is_left_alone_for_longer() -> None:
    d = Decode()
    d.machine.choose(0.0, [P0], 10)
    d.machine.session_refused(0.0, P0, "fingerprint", permanent=True)
    assert d.machine.choose(10.0, [P0], 10).kind is ChoiceKind.NONE
    assert d.machine.choose(31.0, [P0], 10).kind is ChoiceKind.WAIT


def test_a_prompt_beyond_the_credit_may_go_alone_and_nothing_goes_beside_it() -> None:
    d = Decode()
    session = d.connect(credit=5)
    assert d.machine.choose(0.0, [P0], 10).kind is ChoiceKind.READY
    id = d.ask(tokens=10)
    assert d.machine.choose(0.0, [P0], 1).kind is ChoiceKind.WAIT
    d.said(session, first_token(id))
    assert d.machine.choose(0.0, [P0], 10).kind is ChoiceKind.READY, "what is computed is not queued"


def test_a_peer_without_credit_is_passed_over_for_the_next() -> None:
    d = Decode()
    d.connect(P0, "p0", credit=5)
    d.connect(P1, "p1", credit=5)
    d.ask(endpoint=P0)
    assert d.machine.choose(0.0, [P0, P1], 10).endpoint == P1


def test_a_draining_peer_is_skipped_until_its_heartbeat_says_ready() -> None:
    d = Decode()
    session = d.connect()
    d.said(session, m.Heartbeat(InstanceState.DRAINING, Load(), 100))
    assert d.machine.choose(0.0, [P0], 10).kind is ChoiceKind.NONE
    d.said(session, m.Heartbeat(InstanceState.READY, Load(), 100))
    assert d.machine.choose(0.0, [P0], 10).kind is ChoiceKind.READY


def test_no_candidate_at_all_says_so() -> None:
    assert "no prefill" in Decode().machine.choose(0.0, [], 10).reason


# --- refused ---


def test_a_refused_grant_goes_to_the_next_prefill_as_a_new_attempt_of_the_same_request() -> None:
    d = Decode()
    session = d.connect(P0, "p0")
    d.connect(P1, "p1")
    id = d.ask(candidates=(P0, P1))
    d.orders()
    d.said(session, m.Refused(id, "busy"))
    orders = d.orders()
    revoke, grant = d.commands(orders)
    assert isinstance(revoke, m.TransferRevoke) and (revoke.sender, revoke.tag) == ("p0.1.0", id.tag)
    assert isinstance(grant, m.TransferGrant) and grant.sender == "p1.1.0"
    (prefill,) = d.sent(orders)
    assert (prefill.id.counter, prefill.id.attempt) == (id.counter, id.attempt + 1)
    assert prefill.dests[0].blocks_i32 == grant.blocks_i32
    assert not d.notices and d.counts() == (17, 3, 0)


def test_a_grant_that_nobody_takes_comes_back_free() -> None:
    d, session, id = asked(candidates=(P0,))
    d.said(session, m.Refused(id, "mismatch", "first_block"))
    (notice,) = d.notices
    assert isinstance(notice, GrantReturned) and notice.tried == (P0,) and "first_block" in notice.reason
    assert d.counts() == (20, 0, 0)


def test_a_busy_prefill_is_left_alone_until_its_next_word() -> None:
    d, session, id = asked()
    d.said(session, m.Refused(id, "busy"))
    assert d.machine.choose(0.1, [P0], 10).kind is ChoiceKind.WAIT
    d.said(session, m.Heartbeat(InstanceState.READY, Load(), 100))
    assert d.machine.choose(0.1, [P0], 10).kind is ChoiceKind.READY


# --- draining ---


def test_a_cancelled_request_keeps_its_blocks_until_the_peer_says_cancelled() -> None:
    d, session, id = asked()
    d.orders()
    d.machine.cancel(0.0, 1, "client gone")
    assert [type(x) for x in d.sent()] == [m.Cancel]
    assert not d.notices and d.counts() == (17, 3, 0)
    d.said(session, m.Cancelled(id))
    assert d.counts() == (20, 0, 0) and d.machine.outcomes == {"cancelled": 1}


def test_the_runner_forgets_a_grant_that_it_could_not_revoke_itself() -> None:
    d, session, id = asked()
    d.machine.cancel(0.0, 1, "client gone")
    d.tick(1.1)
    d.revoked(id, quiet=False)
    d.orders()
    d.said(session, m.Cancelled(id))
    assert d.commands() == [m.TransferRevoke("p0.1.0", id.tag, over=True)]


def test_a_grant_that_was_revoked_is_not_revoked_again() -> None:
    d, session, id = asked()
    d.machine.session_down(0.0, session, "closed")
    d.orders()
    d.revoked(id, quiet=True)
    assert not d.commands()


def test_while_draining_landed_means_cancelled_when_every_rank_said_it() -> None:
    d = Decode()
    session = d.connect(ranks=2)
    id = d.ask()
    d.machine.cancel(0.0, 1, "client gone")
    d.orders()
    d.landed(session, id, rank=0)
    assert d.counts() == (17, 3, 0)
    d.landed(session, id, rank=1)
    assert d.counts() == (20, 0, 0)
    assert m.LandedAck(id) in d.sent()


def test_a_willing_peer_gets_time_to_answer_before_its_grant_is_revoked_under_it() -> None:
    d, _, id = asked()
    d.machine.cancel(0.0, 1, "client gone")
    d.orders()
    d.tick(0.5)
    assert not d.commands()
    d.tick(1.1)
    orders = d.orders()
    assert [type(c) for c in d.commands(orders)] == [m.TransferRevoke]
    assert [type(x) for x in d.sent(orders)] == [m.Cancel], "and is reminded"
    d.revoked(id, quiet=True)
    assert d.counts() == (20, 0, 0)


def test_failed_is_early_news_and_the_old_grant_drains_until_cancelled() -> None:
    d, session, id = asked()
    d.said(session, m.Failed(id, "out of memory", True))
    (failed,) = d.notices
    assert isinstance(failed, AttemptFailed) and failed.retryable and d.counts() == (17, 3, 0)
    again = d.ask()
    assert (again.counter, again.attempt) == (id.counter, 1) and d.counts() == (14, 6, 0)
    d.said(session, m.Cancelled(id))
    assert d.counts() == (17, 3, 0)


def test_a_peer_that_cancels_on_its_own_fails_the_attempt_and_frees_its_blocks() -> None:
    d, session, id = asked()
    d.said(session, m.Cancelled(id))
    assert isinstance(d.notices[0], AttemptFailed) and d.counts() == (20, 0, 0)


def test_a_request_that_leaves_while_its_blocks_are_verified_frees_them_at_once() -> None:
    d, session, id = asked()
    d.said(session, first_token(id))
    d.landed(session, id)
    d.machine.cancel(0.0, 1, "finished with its first token")
    assert d.counts() == (20, 0, 0)
    _ = d.notices
    d.verified(id)
    assert not d.notices and d.counts() == (20, 0, 0)


def test_waiting_too_long_fails_the_attempt_and_cancels_it() -> None:
    d, _, _ = asked(deadline=1e9)
    d.orders()
    d.now = 301.0
    d.machine.peers.at(P0).heard_at = 301.0
    d.tick(301.0)
    failed = d.notices[0]
    assert isinstance(failed, AttemptFailed) and failed.retryable and "300" in failed.reason
    assert m.Cancel(failed.id) in d.sent()


def test_a_passed_deadline_is_not_worth_another_attempt() -> None:
    d, _, _ = asked(deadline=3.0)
    d.tick(4.0)
    failed = d.notices[0]
    assert isinstance(failed, AttemptFailed) and not failed.retryable and "deadline" in failed.reason


def test_a_deadline_that_a_token_moved_is_the_one_that_counts() -> None:
    d, session, id = asked(deadline=3.0)
    d.now = 2.5
    d.said(session, first_token(id))
    d.machine.prolong(1, 5.5)
    _ = d.notices
    d.tick(3.5)
    assert not d.notices
    d.tick(5.6)
    failed = d.notices[0]
    assert isinstance(failed, AttemptFailed) and not failed.retryable and "deadline" in failed.reason


def test_no_token_makes_the_wait_for_the_blocks_longer() -> None:
    d = Decode(config=HandoffConfig(waiting_timeout=4.0))
    session = d.connect()
    id = d.ask(deadline=3.0)
    d.said(session, first_token(id))
    d.machine.prolong(1, 1e9)
    _ = d.notices
    d.tick(3.9)
    assert not d.notices
    d.tick(4.0)
    failed = d.notices[0]
    assert isinstance(failed, AttemptFailed) and failed.retryable and "within 4 s" in failed.reason


# --- lost peers ---


def test_blocks_of_a_lost_sender_are_free_at_once_where_the_runner_can_revoke() -> None:
    d, session, id = asked()
    d.orders()
    d.machine.session_down(0.0, session, "closed")
    failed = d.notices[0]
    assert isinstance(failed, AttemptFailed) and failed.retryable and d.counts() == (17, 3, 0)
    assert [type(c) for c in d.commands()] == [m.TransferRevoke]
    d.revoked(id, quiet=True)
    assert d.counts() == (20, 0, 0)


def test_blocks_of_a_lost_sender_are_quarantined_where_the_runner_cannot_revoke() -> None:
    d, session, id = asked()
    d.machine.session_down(0.0, session, "closed")
    d.revoked(id, quiet=False)
    assert d.counts() == (17, 0, 3) and d.machine.outcomes == {"lost": 1}


def lost_and_quarantined() -> tuple[Decode, HandoffId]:
    d, session, id = asked()
    d.machine.session_down(0.0, session, "closed")
    d.revoked(id, quiet=False)
    d.orders()
    return d, id


def test_a_lost_sender_is_dialled_again_and_the_hello_lists_what_is_outstanding() -> None:
    d, id = lost_and_quarantined()
    d.tick(0.1)
    (dial,) = d.orders()
    assert isinstance(dial, act.OpenSession) and dial.hello.outstanding == [id]


def test_a_welcome_of_the_same_incarnation_that_does_not_list_it_means_quiet() -> None:
    d, _ = lost_and_quarantined()
    d.connect()
    assert d.counts() == (20, 0, 0)


def test_a_welcome_that_lists_it_keeps_it_until_cancelled() -> None:
    d, id = lost_and_quarantined()
    session = d.connect(writing=(id,))
    assert d.counts() == (17, 0, 3)
    d.said(session, m.Cancelled(id))
    assert d.counts() == (20, 0, 0)


def test_a_welcome_of_a_new_incarnation_proves_nothing_of_the_old_one() -> None:
    d, _ = lost_and_quarantined()
    d.connect(incarnation=2)
    assert d.counts() == (17, 0, 3)
    d.orders()
    d.tick(0.1)
    assert d.commands() == [m.TransferExpel("p0.1.0")]
    d.machine.transfer_said(0.1, m.TransferExpelled("p0.1.0", False))
    assert d.counts() == (17, 0, 3)
    d.tick(0.2)
    assert not d.commands()
    d.tick(1.2)
    assert d.commands() == [m.TransferExpel("p0.1.0")]
    d.machine.transfer_said(1.2, m.TransferExpelled("p0.1.0", True))
    assert d.counts() == (20, 0, 0)


def test_messages_of_a_new_incarnation_about_the_old_ones_hand_offs_are_fenced() -> None:
    d, id = lost_and_quarantined()
    session = d.connect(incarnation=2)
    for message in (m.Cancelled(id), m.Refused(id, "busy"), m.Landed(id, 0, b"", 0)):
        d.said(session, message)
    assert d.counts() == (17, 0, 3)
    assert d.machine.counts.stale == {"Cancelled": 1, "Refused": 1, "Landed": 1}


def test_a_sender_that_stays_away_is_shut_out_for_good() -> None:
    d, _ = lost_and_quarantined()
    d.tick(1.0)
    assert not d.commands()
    d.machine.session_refused(1.0, P0, "no answer")
    d.tick(31.0)
    assert m.TransferExpel("p0.1.0") in d.commands()
    d.connect()
    assert d.machine.choose(31.0, [P0], 1).kind is ChoiceKind.NONE, "its writes would be refused"
    d.machine.transfer_said(31.0, m.TransferExpelled("p0.1.0", True))
    assert d.counts() == (20, 0, 0)
    d.now = 90.0
    d.connect(incarnation=2)
    assert d.machine.choose(90.0, [P0], 1).kind is ChoiceKind.READY


def test_what_has_landed_survives_the_loss_of_its_sender() -> None:
    d, session, id = asked()
    d.said(session, first_token(id))
    d.landed(session, id)
    d.machine.session_down(0.0, session, "closed")
    d.verified(id)
    assert isinstance(d.notices[-1], Ready)


def test_expel_must_be_true_on_every_local_rank() -> None:
    d = Decode(ranks=2)
    session = d.connect()
    id = d.ask()
    d.machine.session_down(0.0, session, "closed")
    d.revoked(id, quiet=False, rank=0)
    d.revoked(id, quiet=False, rank=1)
    d.connect(incarnation=2)
    d.tick(0.1)
    d.machine.transfer_said(0.1, m.TransferExpelled("p0.1.0", True, 1))
    assert d.counts() == (17, 0, 3)
    d.machine.transfer_said(0.1, m.TransferExpelled("p0.1.0", True, 0))
    assert d.counts() == (20, 0, 0)


# --- duplicates, strangers, liveness ---


def test_a_late_landed_is_acknowledged_again_and_changes_nothing() -> None:
    d, session, id = asked()
    d.machine.cancel(0.0, 1, "client gone")
    d.said(session, m.Cancelled(id))
    d.orders()
    d.landed(session, id)
    assert d.sent() == [m.LandedAck(id)] and d.counts() == (20, 0, 0)


def test_a_landed_of_another_incarnation_of_this_instance_is_not_even_acknowledged() -> None:
    d = Decode()
    session = d.connect()
    d.orders()
    d.landed(session, HandoffId(99, 1, 0))
    assert not d.sent() and d.machine.counts.stale == {"Landed": 1}


def test_a_peer_cannot_speak_of_anothers_hand_off() -> None:
    d = Decode()
    d.connect(P0, "p0")
    other = d.connect(P1, "p1")
    id = d.ask(endpoint=P0)
    d.said(other, m.Cancelled(id))
    d.said(other, first_token(id))
    assert not d.notices and d.counts() == (17, 3, 0)


def test_a_message_of_an_ended_session_is_counted_and_dropped() -> None:
    d, session, id = asked()
    d.machine.session_down(0.0, session, "gap")
    _ = d.notices
    d.said(session, first_token(id))
    assert not d.notices and d.machine.counts.stale == {"FirstToken": 1}


def test_a_second_first_token_is_dropped() -> None:
    d, session, id = asked()
    d.said(session, first_token(id, 1))
    d.said(session, first_token(id, 2))
    assert len(d.notices) == 1


def test_a_landed_that_does_not_fit_fails_the_attempt_without_trusting_it() -> None:
    d, session, id = asked()
    d.landed(session, id, blocks=2)
    assert isinstance(d.notices[0], AttemptFailed) and d.counts() == (17, 3, 0)


def test_missed_heartbeats_end_the_session_and_every_hand_off_on_it() -> None:
    d, session, _ = asked()
    d.tick(5.0)
    d.tick(10.5)
    assert act.CloseSession(session, "heartbeats missed") not in d.orders()
    d.tick(10.6)
    assert act.CloseSession(session, "heartbeats missed") in d.orders()
    assert isinstance(d.notices[0], AttemptFailed)


def test_heartbeats_go_out_when_nothing_else_did() -> None:
    d = Decode()
    session = d.connect()
    d.orders()
    for step in range(1, 5):
        d.said(session, m.Heartbeat(InstanceState.READY, Load(), 100))
        d.now = 2.5 * step
        d.tick(d.now)
        d.said(session, m.Heartbeat(InstanceState.READY, Load(), 100))
    assert [type(x) for x in d.sent()] == [m.Heartbeat, m.Heartbeat]


def test_one_instance_under_two_names_is_one_peer() -> None:
    d = Decode()
    first = d.connect(P0, "p0")
    d.orders()
    d.connect("tcp://localhost:1", "p0")
    assert any(isinstance(o, act.CloseSession) and o.session == first for o in d.orders())
    for endpoint in (P0, "tcp://localhost:1"):
        assert d.machine.choose(0.0, [endpoint], 1).kind is ChoiceKind.READY


def test_a_session_that_was_not_asked_for_is_closed() -> None:
    d = Decode()
    d.connect()
    d.orders()
    welcome = m.Welcome(9, "", "p9", 1, [], InstanceState.READY, 0)
    d.machine.session_up(0.0, P0, welcome)
    assert d.orders() == [act.CloseSession(9, "not asked for")]


def test_goodbye_ends_every_session_in_an_orderly_way() -> None:
    d, session, _ = asked()
    d.orders()
    d.machine.goodbye("drained")
    orders = d.orders()
    assert orders[0] == act.SendPeer(session, m.Goodbye("drained"))
    assert act.CloseSession(session, "drained") in orders


def test_ids_of_two_instances_do_not_meet() -> None:
    names = [identity(f"d{i}").instance for i in range(50)]
    assert len({first_counter(name) for name in names}) == 50


def test_a_request_that_used_up_its_attempts_gets_a_new_counter() -> None:
    d = Decode(config=HandoffConfig())
    session = d.connect(credit=10_000)
    seen = set()
    for _ in range(300):
        id = d.ask()
        seen.add(id.tag)
        d.said(session, m.Cancelled(id))
    assert len(seen) == 300
