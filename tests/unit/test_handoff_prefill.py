"""The prefill side of the hand-off, one scenario per test."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from pd import messages as m
from pd.scheduler import actions as act
from pd.scheduler.handoff import PREFILL_TABLE, Accepted, HandoffConfig, PrefillHandoffs, RoomAnswered, SourceFree, Stop
from pd.scheduler.handoff_base import ints, sending_ranks, source_ranks, to_i32
from pd.types import HandoffId, InstanceState, Load
from tests.handoff_kit import GROUP, Prefill, identity


def accepted(**changes: Any) -> tuple[Prefill, int, HandoffId]:
    p = Prefill()
    session = p.connect()
    id = p.ask(session, **changes)
    (notice,) = p.notices
    assert isinstance(notice, Accepted)
    p.machine.started(id)
    p.orders()
    return p, session, id


def test_every_state_and_event_of_the_prefill_table_is_defined() -> None:
    assert PREFILL_TABLE.undefined() == []


# --- sessions ---


def test_the_welcome_waits_for_the_data_connection() -> None:
    p = Prefill()
    p.hello()
    orders = p.orders()
    assert p.commands(orders) == [m.TransferConnect("d.1.0", b"descriptor of d.1.0", (0, 2))]
    p.transfer(m.TransferConnected("d.1.0"))
    welcome = p.welcome()
    assert welcome is not None and welcome.credit_tokens == 100 and welcome.instance == "p"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", 99),
        ("fingerprint", "another model"),
        ("block_tokens", 8),
        ("layout", "layer-major"),
        ("digest", "crc"),
        ("transfer", "other"),
        ("lanes", 2),
        ("groups", []),
        ("groups", [replace(GROUP, head_dim=16)]),
        ("kv_cache_dtype", [replace(GROUP, dtype="fp8_e4m3")]),
        ("kv_scales", [replace(GROUP, scales="0011223344556677")]),
        ("ranks", []),
        ("heartbeat_ms", 0),
    ],
)
def test_a_mismatch_is_refused_naming_the_field(field: str, value: Any) -> None:
    p = Prefill()
    p.hello(conn=7, **{field if not field.startswith("kv_") else "groups": value})
    (refusal,) = p.orders()
    assert isinstance(refusal, act.RefusePeer) and (refusal.conn, refusal.unwelcome.field) == (7, field)


def test_a_second_hello_of_the_same_instance_ends_the_older_session() -> None:
    p, session, id = accepted()
    p.hello(conn=2)
    orders = p.orders()
    assert any(isinstance(o, act.CloseSession) and o.session == session for o in orders)
    assert Stop(id, "decode instance lost: the instance opened another session") in p.notices
    assert any(isinstance(o, act.WelcomePeer) for o in orders), "the data connection of this incarnation is kept"


def test_a_new_incarnation_resets_the_old_ones_data_connection() -> None:
    p = Prefill()
    p.connect()
    p.hello(conn=2, incarnation=2)
    assert [type(c) for c in p.commands()] == [m.TransferResetPeer, m.TransferConnect]


def test_the_welcome_lists_what_may_still_be_written() -> None:
    p, _, id = accepted()
    push = p.push(id)
    p.hello(conn=2, outstanding=(id,))
    welcome = p.welcome()
    assert welcome is not None and welcome.writing == [id]
    p.pushed(push)
    assert p.sent() == [m.Cancelled(id)], "on the new session, when the last write is done"
    assert p.notices[-1] == SourceFree(id)


def test_a_data_connection_that_cannot_be_made_is_said_so() -> None:
    p = Prefill()
    p.hello(conn=3)
    p.orders()
    p.transfer(m.TransferPeerLost("d.1.0", "refused"))
    refusal = p.orders()[0]
    assert isinstance(refusal, act.RefusePeer) and refusal.unwelcome.field == "transfer"


def test_a_hello_whose_data_connection_takes_too_long_is_refused() -> None:
    p = Prefill()
    p.hello(conn=3)
    p.orders()
    p.tick(3.1)
    assert any(isinstance(o, act.RefusePeer) and o.conn == 3 for o in p.orders())


def test_session_numbers_of_two_instances_do_not_meet() -> None:
    first = {PrefillHandoffs([], identity("p", i), HandoffConfig()).peers._next_session for i in range(50)}
    assert len(first) == 50


# --- the way that goes well ---


def test_an_accepted_prompt_is_pushed_and_landed_when_the_last_write_is_done() -> None:
    p, session, id = accepted()
    first = p.push(id, 0, 1)
    (command,) = p.commands()
    assert command == m.TransferPush(first) and ints(first.dst_i32) == [30] and first.peer == "d.1.0"
    rest = p.push(id, 1, 2, after_step=True)
    assert not p.commands(), "it rides on the step order"
    assert ints(rest.dst_i32) == [31, 32]
    p.compute(id)
    assert [type(x) for x in p.sent()] == [m.FirstToken]
    p.pushed(rest)
    assert not p.notices and not p.sent()
    p.pushed(first)
    (landed,) = p.sent()
    assert landed == m.Landed(id, 0, landed.digests_u64, 128) and len(landed.digests_u64) == 24
    assert p.notices == [SourceFree(id)]
    assert not p.machine.quiet, "the decode instance has not acknowledged"
    p.said(session, m.LandedAck(id))
    assert p.machine.quiet and p.machine.audit() == {} and p.machine.outcomes == {"landed": 1}


def test_landed_waits_for_blocks_that_were_not_pushed_yet() -> None:
    p, _, id = accepted()
    p.compute(id)
    p.orders()
    push = p.push(id, 0, 2)
    p.pushed(push)
    assert not [x for x in p.sent() if isinstance(x, m.Landed)]
    p.pushed(p.push(id, 2, 1))
    assert [type(x) for x in p.sent()] == [m.Landed]


def test_landed_never_overtakes_the_first_token() -> None:
    p, _, id = accepted()
    p.pushed(p.push(id))
    p.machine.computed(0.0, id, [1, 2, 3])
    assert not p.sent()
    p.machine.first_token(0.0, id, [m.FirstChoice(5)], 0)
    assert [type(x) for x in p.sent()] == [m.FirstToken, m.Landed]


def test_a_push_of_a_hand_off_that_two_ranks_serve_is_done_when_both_said_so() -> None:
    p = Prefill(ranks=2)
    p.hello()
    p.transfer(m.TransferConnected("d.1.0", 0))
    assert p.welcome() is None
    p.transfer(m.TransferConnected("d.1.0", 1))
    welcome = p.welcome()
    assert welcome is not None
    id = p.ask(welcome.session)
    push = p.push(id)
    p.machine.first_token(0.0, id, [m.FirstChoice(5)], 0)
    p.machine.computed(0.0, id, {0: [1, 2, 3], 1: [4, 5, 6]})
    p.orders()
    p.pushed(push, rank=0)
    assert not p.sent()
    p.pushed(push, rank=1)
    assert [(x.rank, x.nbytes) for x in p.sent()] == [(0, 64), (1, 64)]


def test_a_decode_instance_of_two_ranks_gets_one_push_per_rank() -> None:
    p = Prefill()
    session = p.connect(ranks=2)
    id = p.ask(session)
    pushes = p.machine.push_all(id, [1, 2, 3], 0, after_step=False)
    assert [x.peer for x in pushes] == ["d.1.0", "d.1.1"]
    p.compute(id)
    p.orders()
    for push in pushes:
        p.pushed(push)
    assert [type(x) for x in p.sent()] == [m.Landed]


# --- refusing ---


def test_a_draining_instance_refuses_and_nothing_starts() -> None:
    p = Prefill()
    session = p.connect()
    p.machine.set_status(0.0, InstanceState.DRAINING, Load(), 100)
    p.orders()
    id = p.ask(session)
    assert p.sent() == [m.Refused(id, "draining")] and not p.notices


def test_a_duplicate_of_a_refused_prefill_is_refused_again() -> None:
    p = Prefill()
    session = p.connect()
    p.machine.set_status(0.0, InstanceState.DRAINING, Load(), 100)
    message = p.prefill()
    p.said(session, message)
    p.machine.set_status(0.0, InstanceState.READY, Load(), 100)
    p.orders()
    p.said(session, message)
    assert p.sent() == [m.Refused(message.id, "draining")] and not p.notices


def test_beyond_the_credit_it_is_busy_unless_the_peer_has_nothing_here() -> None:
    p = Prefill()
    session = p.connect()
    p.machine.set_status(0.0, InstanceState.READY, Load(), 12)
    p.ask(session, tokens=20)
    assert [type(n) for n in p.notices] == [Accepted]
    p.orders()
    id = p.ask(session, tokens=1)
    assert p.sent() == [m.Refused(id, "busy", "no queue credit")]


def test_an_instance_is_told_its_own_window_of_unfinished_tokens() -> None:
    p = Prefill()
    session = p.connect()
    p.ask(session, tokens=20)
    p.orders()
    p.now = 1.0
    p.machine.set_status(1.0, InstanceState.READY, Load(), 70)
    assert [x.credit_tokens for x in p.sent()] == [90]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_i32": b""},
        {"tokens_i32": b"12345"},
        {"remaining_ms": 0},
        {"prompt_len": 0},
        {"prompt_len": 11},
        {"choices": 0},
        {"dests": []},
        {"dests": [m.Dest(0, 0, to_i32([1, 2]), to_i32([1, 1]))]},
        {"dests": [m.Dest(0, 0, to_i32([1, 2, 3]), to_i32([1, 1]))]},
        {"dests": [m.Dest(0, 0, to_i32([1, 2, 2]), to_i32([1, 1, 1]))]},
        {"dests": [m.Dest(0, 0, to_i32([0, 1, 2]), to_i32([1, 1, 1]))]},
        {"dests": [m.Dest(1, 0, to_i32([1, 2, 3]), to_i32([1, 1, 1]))]},
        {"id": HandoffId(2, 1, 0)},
    ],
)
def test_a_prefill_that_makes_no_sense_is_a_mismatch(changes: dict[str, Any]) -> None:
    p = Prefill()
    session = p.connect()
    p.said(session, p.prefill(**changes))
    (refused,) = p.sent()
    assert isinstance(refused, m.Refused) and refused.why == "mismatch" and not p.notices


@pytest.mark.parametrize("first", [-1, 3])
def test_a_first_block_outside_of_the_prompt_is_a_mismatch(first: int) -> None:
    p = Prefill()
    session = p.connect()
    p.said(session, p.prefill(dests=[m.Dest(0, 0, b"", b"")], first_block=first))
    assert p.sent()[0].why == "mismatch"


# --- stopping ---


def test_a_cancel_of_a_computing_hand_off_stops_it_and_is_answered_when_it_is_quiet() -> None:
    p, session, id = accepted()
    push = p.push(id, 0, 1)
    p.orders()
    p.said(session, m.Cancel(id))
    orders = p.orders()
    assert p.commands(orders) == [m.TransferCancel("d.1.0", id.tag)] and not p.sent(orders)
    assert p.notices == [Stop(id, "cancelled by the decode instance")]
    p.pushed(push)
    assert p.sent() == [m.Cancelled(id)] and p.notices == [SourceFree(id)]


def test_nothing_is_pushed_for_a_hand_off_that_was_stopped() -> None:
    p, session, id = accepted()
    p.said(session, m.Cancel(id))
    assert p.machine.push(id, [1], 0, after_step=True) is None


def test_a_cancel_of_an_unknown_id_is_answered_and_blocks_a_late_prefill() -> None:
    p = Prefill()
    session = p.connect()
    message = p.prefill()
    p.said(session, m.Cancel(message.id))
    assert p.sent() == [m.Cancelled(message.id)]
    p.said(session, message)
    assert not p.notices and not p.sent()


def test_a_duplicate_prefill_starts_nothing_twice() -> None:
    p = Prefill()
    session = p.connect()
    message = p.prefill()
    p.said(session, message)
    p.said(session, message)
    assert len(p.notices) == 1


def test_a_cancel_after_landed_is_answered_too() -> None:
    p, session, id = accepted()
    p.pushed(p.push(id))
    p.compute(id)
    p.orders()
    p.said(session, m.Cancel(id))
    assert p.sent() == [m.Cancelled(id)]


def test_a_dropped_push_that_never_started_needs_no_reset() -> None:
    p, session, id = accepted()
    push = p.push(id)
    p.said(session, m.Cancel(id))
    p.orders()
    p.failed(push, quiet=True)
    orders = p.orders()
    assert p.sent(orders) == [m.Cancelled(id)] and not p.commands(orders)


def test_a_failed_push_fails_every_hand_off_to_that_peer_and_none_is_quiet_before_the_reset() -> None:
    p = Prefill()
    session, other = p.connect("d"), p.connect("e", conn=2)
    a, b, c = p.ask(session), p.ask(session), p.ask(other)
    push = p.push(a, 0, 1)
    p.push(b, 0, 1)
    p.push(c, 0, 1)
    p.orders()
    _ = p.notices
    p.failed(push)
    orders = p.orders()
    sent = p.sent(orders)
    assert {x.id for x in sent if isinstance(x, m.Failed)} == {a, b} and len(sent) == 2
    assert p.commands(orders)[-1] == m.TransferResetPeer("d.1.0")
    assert {n.id for n in p.notices if isinstance(n, Stop)} == {a, b}
    p.transfer(m.TransferReset("d.1.0"))
    orders = p.orders()
    assert p.notices == [SourceFree(a), SourceFree(b)]
    assert p.commands(orders) == [m.TransferConnect("d.1.0", b"descriptor of d.1.0", (0, 2))]
    assert not p.sent(orders), "what the network holds may still land"
    p.tick(1.0)
    assert {x.id for x in p.sent() if isinstance(x, m.Cancelled)} == {a, b}


def test_while_the_data_connection_is_made_anew_prefills_are_refused_as_busy() -> None:
    p, session, id = accepted()
    p.failed(p.push(id))
    p.orders()
    again = p.ask(session)
    assert [type(x) for x in p.sent()] == [m.Refused]
    p.transfer(m.TransferReset("d.1.0"))
    p.transfer(m.TransferConnected("d.1.0"))
    p.orders()
    third = p.ask(session)
    assert [n.id for n in p.notices if isinstance(n, Accepted)] == [third] and again != third


def landed_times(p: Prefill) -> dict[str, float]:
    (line,) = (dict(o.fields) for o in p.out if isinstance(o, act.Log) and o.event == "handoff_landed")
    return {name: line[name] for name in ("push_ms", "after_compute_ms")}


def test_a_landed_prompt_counts_from_the_end_of_its_compute() -> None:
    p, _, id = accepted()
    push = p.push(id, after_step=True)
    p.now = 5.0
    p.compute(id)
    p.now = 5.25
    p.pushed(push, micros=240_000)
    assert landed_times(p) == {"push_ms": 240.0, "after_compute_ms": 250.0}


def test_a_push_that_is_done_before_its_steps_result_is_known_counts_from_its_begin() -> None:
    p, _, id = accepted()
    push = p.push(id, after_step=True)
    p.now = 5.0
    p.pushed(push, micros=30_000)
    p.now = 5.01
    p.compute(id)
    assert landed_times(p) == {"push_ms": 30.0, "after_compute_ms": 40.0}


def test_pushes_that_overlap_count_once_and_pauses_between_them_do_not() -> None:
    p, _, id = accepted()
    pushes = [p.push(id, index, 1) for index in range(3)]
    p.now = 2.0
    p.pushed(pushes[1], micros=1_000_000)
    p.now = 3.0
    p.pushed(pushes[0], micros=2_000_000)
    p.now = 6.0
    p.compute(id)
    p.now = 6.5
    p.pushed(pushes[2], micros=500_000)
    assert landed_times(p) == {"push_ms": 2500.0, "after_compute_ms": 500.0}


def test_a_reset_does_not_end_a_push_that_still_rides_on_a_step() -> None:
    p, _, id = accepted()
    posted = p.push(id, 0, 1)
    riding = p.push(id, 1, 2, after_step=True)
    p.machine.ordered(7)
    p.failed(posted)
    p.orders()
    p.transfer(m.TransferReset("d.1.0"))
    assert not [x for x in p.sent() if isinstance(x, m.Cancelled)], "the runner may get that push after the reset"
    assert not [n for n in p.notices if isinstance(n, SourceFree)]
    p.machine.step_done(7)
    p.tick(3.0)
    assert m.TransferResetPeer("d.1.0") in p.commands()
    p.transfer(m.TransferReset("d.1.0"))
    assert SourceFree(id) in p.notices
    p.tick(4.0)
    assert [x for x in p.sent() if isinstance(x, m.Cancelled)] == [m.Cancelled(id)]
    p.failed(riding)
    assert not p.sent()


def test_a_riding_push_that_reports_itself_needs_no_second_reset() -> None:
    p, _, id = accepted()
    posted = p.push(id, 0, 1)
    riding = p.push(id, 1, 2, after_step=True)
    p.failed(posted)
    p.transfer(m.TransferReset("d.1.0"))
    p.orders()
    p.failed(riding, quiet=True)
    p.tick(1.0)
    orders = p.orders()
    assert m.Cancelled(id) in p.sent(orders) and m.TransferResetPeer("d.1.0") not in p.commands(orders)


def test_the_scheduler_may_fail_a_hand_off() -> None:
    p, _, id = accepted()
    p.machine.fail(0.0, id, "no memory", retryable=True)
    assert p.sent() == [m.Failed(id, "no memory", True), m.Cancelled(id)]
    assert [type(n) for n in p.notices] == [Stop, SourceFree]


def test_a_passed_deadline_fails_the_hand_off_for_good() -> None:
    p, session, _ = accepted(remaining_ms=1000)
    p.said(session, m.Heartbeat(InstanceState.READY, Load()))
    p.tick(1.1)
    failed = p.sent()[0]
    assert isinstance(failed, m.Failed) and not failed.retryable and "deadline" in failed.reason


def test_after_the_first_token_only_the_decode_instance_knows_the_deadline() -> None:
    p, session, id = accepted(remaining_ms=1000)
    push = p.push(id)
    p.machine.first_token(0.9, id, [m.FirstChoice(7)], 0)
    p.machine.computed(0.9, id, [1, 2, 3])
    p.orders()
    p.said(session, m.Heartbeat(InstanceState.READY, Load()))
    p.tick(1.1)
    assert not p.sent() and not [n for n in p.notices if isinstance(n, SourceFree)]
    p.pushed(push)
    assert [type(x) for x in p.sent()] == [m.Landed]


def test_a_lost_session_stops_everything_and_frees_sources_only_when_quiet() -> None:
    p, session, id = accepted()
    push = p.push(id)
    p.orders()
    p.machine.session_down(0.0, session, "closed")
    assert [type(n) for n in p.notices] == [Stop]
    p.tick(0.9)
    assert m.TransferResetPeer("d.1.0") not in p.commands()
    p.tick(1.1)
    assert m.TransferResetPeer("d.1.0") in p.commands(), "its writes did not end soon"
    assert not p.notices
    p.transfer(m.TransferReset("d.1.0"))
    assert p.notices == [SourceFree(id)] and not p.sent()
    p.pushed(push)
    assert p.machine.counts.stale


def test_a_data_connection_that_nobody_wants_is_closed() -> None:
    p = Prefill()
    session = p.connect()
    p.machine.session_down(0.0, session, "closed")
    p.tick(2.1)
    assert p.commands() == [m.TransferResetPeer("d.1.0")]
    p.transfer(m.TransferReset("d.1.0"))
    assert p.machine.peers.receiver("d.1.0") is None


def test_a_lost_data_connection_ends_the_session() -> None:
    p, session, id = accepted()
    p.transfer(m.TransferPeerLost("d.1.0", "gone"))
    orders = p.orders()
    assert act.CloseSession(session, "data connection lost: gone") in orders
    assert [type(n) for n in p.notices] == [Stop, SourceFree]
    assert m.TransferResetPeer("d.1.0") in p.commands(orders) and id


def test_a_welcome_after_a_reset_still_lists_what_the_network_may_hold() -> None:
    p, _, id = accepted()
    p.failed(p.push(id))
    p.transfer(m.TransferReset("d.1.0"))
    p.transfer(m.TransferConnected("d.1.0"))
    p.hello(conn=2, outstanding=(id,))
    welcome = p.welcome()
    assert welcome is not None and welcome.writing == [id]
    p.tick(1.0)
    assert m.Cancelled(id) in p.sent()


# --- strangers, liveness ---


def test_a_report_of_an_unknown_push_is_counted() -> None:
    p, _, id = accepted()
    push = p.push(id)
    p.transfer(m.TransferPushed(push.tag, push.index + 1, 64))
    p.transfer(m.TransferPushed(push.tag + 1, push.index, 64))
    assert p.machine.counts.stale == {"TransferPushed": 2}


def test_a_decode_instance_cannot_cancel_anothers_hand_off() -> None:
    p = Prefill()
    mine, other = p.connect("d"), p.connect("e", conn=2)
    id = p.ask(mine)
    _ = p.notices
    p.said(other, m.Cancel(id))
    assert not p.notices


def test_a_cancel_for_an_id_of_another_incarnation_is_fenced() -> None:
    p = Prefill()
    session = p.connect(incarnation=2)
    p.said(session, m.Cancel(HandoffId(1, 5, 0)))
    assert not p.sent() and p.machine.counts.stale


def test_missed_heartbeats_end_the_session() -> None:
    p, session, _ = accepted()
    p.tick(10.5)
    assert act.CloseSession(session, "heartbeats missed") not in p.orders()
    p.tick(10.6)
    assert act.CloseSession(session, "heartbeats missed") in p.orders()


def test_a_change_of_state_is_told_at_once_and_at_a_bounded_rate() -> None:
    p = Prefill()
    p.connect()
    p.machine.set_status(1.0, InstanceState.READY, Load(), 50)
    p.machine.set_status(1.01, InstanceState.DRAINING, Load(), 40)
    assert [x.credit_tokens for x in p.sent()] == [50]
    p.tick(1.06)
    assert [(x.state, x.credit_tokens) for x in p.sent()] == [(InstanceState.DRAINING, 40)]


def test_an_answer_for_a_room_is_handed_on() -> None:
    p = Prefill()
    session = p.connect()
    answered = m.Answered(4, 0, [m.FirstChoice(3)])
    p.said(session, answered)
    assert p.notices == [RoomAnswered(session, answered)]


def test_goodbye_of_a_peer_ends_its_session() -> None:
    p, session, id = accepted()
    p.said(session, m.Goodbye("drained"))
    assert act.CloseSession(session, "drained") in p.orders()
    assert [type(n) for n in p.notices] == [Stop, SourceFree] and id


# --- who sends to whom ---


def test_one_source_rank_per_kv_head() -> None:
    def rank(number: int, heads: tuple[int, int], layers: tuple[int, int] = (0, 4)) -> m.RankInfo:
        return m.RankInfo(0, number, layers, heads, f"r{number}", b"")

    four = [rank(i, (2 * i, 2 * i + 2)) for i in range(4)]
    assert source_ranks(four, rank(0, (0, 8))) == (0, 1, 2, 3)
    assert source_ranks(four, rank(1, (4, 8))) == (2, 3)
    assert source_ranks([rank(0, (0, 8))], rank(3, (6, 8))) == (0,)
    replicated = [rank(0, (0, 1)), rank(1, (0, 1)), rank(2, (1, 2)), rank(3, (1, 2))]
    assert sending_ranks(replicated, [rank(0, (0, 2))]) == {0: "r0", 2: "r2"}
    assert source_ranks(four[:3], rank(0, (0, 8))) is None
    staged = [rank(0, (0, 8), (0, 2)), rank(1, (0, 8), (2, 4))]
    assert source_ranks(staged, rank(0, (0, 8))) == (0, 1)
