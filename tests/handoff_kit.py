"""Builders and small harnesses for the hand-off tests: one machine, its orders read back as plain lists."""

from __future__ import annotations

from typing import Any

from pd import messages as m
from pd.scheduler import actions as act
from pd.scheduler.blocks import BlockPool
from pd.scheduler.handoff import AskSpec, ChoiceKind, DecodeHandoffs, HandoffConfig, LocalIdentity, PrefillHandoffs
from pd.scheduler.handoff_base import to_i32, to_u64
from pd.types import HandoffId, InstanceState, Load, SamplingParams

PAGE = 4
P0, P1 = "tcp://p0:1", "tcp://p1:1"
GROUP = m.KvGroup(0, (0, 2), PAGE, 8, "float32")


def rank(instance: str, incarnation: int, number: int = 0, heads: tuple[int, int] = (0, 2)) -> m.RankInfo:
    identity = f"{instance}.{incarnation}.{number}"
    return m.RankInfo(0, number, (0, 2), heads, identity, b"descriptor of " + identity.encode())


def identity(instance: str, incarnation: int = 1, ranks: int = 1, **changes: Any) -> LocalIdentity:
    split = [(2 * r // ranks, 2 * (r + 1) // ranks) for r in range(ranks)]
    known: dict[str, Any] = {
        "fingerprint": "model",
        "block_tokens": PAGE,
        "layout": "block-major",
        "digest": "sum64",
        "transfer": "sim",
        "ranks": [rank(instance, incarnation, r, split[r]) for r in range(ranks)],
        "groups": [GROUP],
        "http": f"http://{instance}",
    }
    return LocalIdentity(instance=instance, incarnation=incarnation, **{**known, **changes})


def spec(tokens: int = 10, first_block: int = 0, deadline: float = 1000.0, **changes: Any) -> AskSpec:
    fields: dict[str, Any] = {
        "tokens_i32": to_i32(range(tokens)),
        "prompt_len": tokens,
        "sampling": SamplingParams(seed=1),
        "first_block": first_block,
        "deadline": deadline,
        "tail_tokens": tokens % PAGE or PAGE,
    }
    return AskSpec(**{**fields, **changes})


def first_token(id: HandoffId, token: int = 5) -> m.FirstToken:
    return m.FirstToken(id, [m.FirstChoice(token)], 0)


class Machine:
    """Reads back what a machine ordered since the last look."""

    def __init__(self) -> None:
        self.out: list[act.Action] = []
        self.now = 0.0

    def orders(self) -> list[act.Action]:
        orders = self.out[:]
        self.out.clear()
        return [o for o in orders if not isinstance(o, act.Log)]

    def sent(self, orders: list[act.Action] | None = None) -> list[Any]:
        return [o.message for o in (self.orders() if orders is None else orders) if isinstance(o, act.SendPeer)]

    def commands(self, orders: list[act.Action] | None = None) -> list[Any]:
        return [o.command for o in (self.orders() if orders is None else orders) if isinstance(o, act.Transfer)]


class Decode(Machine):
    def __init__(
        self, blocks: int = 21, ranks: int = 1, config: HandoffConfig | None = None, vocab_size: int = 1 << 31
    ) -> None:
        super().__init__()
        self.pool = BlockPool(blocks)
        who = identity("d", ranks=ranks, vocab_size=vocab_size)
        self.machine = DecodeHandoffs(self.out, self.pool, who, config or HandoffConfig())
        self.session = 100

    def connect(self, endpoint: str = P0, instance: str = "p0", incarnation: int = 1, ranks: int = 1, credit: int = 100,
                writing: tuple[HandoffId, ...] = ()) -> int:  # fmt: skip
        """Dial (unless that was done) and welcome."""
        peer = self.machine.peers.at(endpoint)
        if peer.link.value == "down":
            assert self.machine.choose(self.now, [endpoint], 1).kind is ChoiceKind.WAIT
        self.session += 1
        who = identity(instance, incarnation, ranks)
        welcome = m.Welcome(
            self.session,
            "",
            instance,
            incarnation,
            list(who.ranks),
            InstanceState.READY,
            credit,
            list(writing),
            who.http,
        )
        self.machine.session_up(self.now, endpoint, welcome)
        return self.session

    def ask(self, key: int = 1, endpoint: str = P0, **changes: Any) -> HandoffId:
        what = spec(**changes)
        grant = self.pool.grant(-(-what.tokens // PAGE) - what.first_block)
        assert grant is not None
        return self.machine.ask(self.now, key, endpoint, what, grant)

    def said(self, session: int, message: Any) -> None:
        self.machine.peer_said(self.now, session, message)

    def landed(self, session: int, id: HandoffId, blocks: int = 3, rank: int = 0) -> None:
        self.said(session, m.Landed(id, rank, to_u64(range(blocks)), 64))

    def verified(self, id: HandoffId, bad: tuple[int, ...] = (), **changes: Any) -> None:
        self.machine.transfer_said(self.now, m.TransferVerified(id.tag, to_i32(bad), 64, **changes))

    def revoked(self, id: HandoffId, quiet: bool, sender: str = "p0.1.0", rank: int = 0) -> None:
        self.machine.transfer_said(self.now, m.TransferRevoked(id.tag, quiet, sender, rank))

    def tick(self, now: float) -> None:
        self.now = now
        self.machine.tick(now)

    @property
    def notices(self) -> list[Any]:
        return self.machine.take_notices()

    def counts(self) -> tuple[int, int, int]:
        """(free, incoming, quarantined), after the audit."""
        self.machine.audit()
        counts = self.pool.audit()
        return counts["free"], counts["incoming"], counts["quarantined"]


class Prefill(Machine):
    def __init__(self, ranks: int = 1, config: HandoffConfig | None = None) -> None:
        super().__init__()
        self.machine = PrefillHandoffs(self.out, identity("p", ranks=ranks), config or HandoffConfig())
        self.machine.set_status(0.0, InstanceState.READY, Load(), 100)
        self.counter = 0

    def hello(self, conn: int = 1, instance: str = "d", incarnation: int = 1, tp: int = 1,
              outstanding: tuple[HandoffId, ...] = (), **changes: Any) -> m.Hello:  # fmt: skip
        who = identity(instance, incarnation, tp)
        fields: dict[str, Any] = {
            "protocol": m.PROTOCOL_VERSION,
            "instance": instance,
            "incarnation": incarnation,
            "fingerprint": who.fingerprint,
            "block_tokens": PAGE,
            "layout": who.layout,
            "digest": who.digest,
            "transfer": who.transfer,
            "lanes": 1,
            "ranks": list(who.ranks),
            "groups": list(who.groups),
            "outstanding": list(outstanding),
        }
        hello = m.Hello(**{**fields, **changes})
        self.machine.hello(self.now, conn, hello)
        return hello

    def welcome(self) -> m.Welcome | None:
        return next((o.welcome for o in self.orders() if isinstance(o, act.WelcomePeer)), None)

    def connect(self, instance: str = "d", incarnation: int = 1, ranks: int = 1, conn: int = 1) -> int:
        self.hello(conn, instance, incarnation, ranks)
        for r in range(ranks):
            self.transfer(m.TransferConnected(f"{instance}.{incarnation}.{r}"))
        welcome = self.welcome()
        assert welcome is not None
        return welcome.session

    def prefill(self, tokens: int = 10, first_block: int = 0, incarnation: int = 1, **changes: Any) -> m.Prefill:
        self.counter += 1
        count = -(-tokens // PAGE) - first_block
        fields: dict[str, Any] = {
            "id": HandoffId(incarnation, self.counter, 0),
            "tokens_i32": to_i32(range(tokens)),
            "prompt_len": tokens,
            "sampling": SamplingParams(seed=1),
            "first_block": first_block,
            "dests": [m.Dest(0, 0, to_i32(range(30, 30 + count)), to_i32([1] * count))],
            "remaining_ms": 60_000,
        }
        return m.Prefill(**{**fields, **changes})

    def ask(self, session: int, **changes: Any) -> HandoffId:
        message = self.prefill(**changes)
        self.said(session, message)
        return message.id

    def said(self, session: int, message: Any) -> None:
        self.machine.peer_said(self.now, session, message)

    def transfer(self, event: Any) -> None:
        self.machine.transfer_said(self.now, event)

    def push(self, id: HandoffId, first: int = 0, count: int = 3, after_step: bool = False) -> m.Push:
        push = self.machine.push(id, list(range(1, 1 + count)), first, after_step=after_step)
        assert push is not None
        return push

    def compute(self, id: HandoffId) -> None:
        self.machine.first_token(self.now, id, [m.FirstChoice(5)], 0)
        self.machine.computed(self.now, id, [1, 2, 3])

    def pushed(self, push: m.Push, rank: int = 0, micros: int = 0) -> None:
        self.transfer(m.TransferPushed(push.tag, push.index, 64, push.peer, rank, micros))

    def failed(self, push: m.Push, quiet: bool = False) -> None:
        self.transfer(m.TransferFailed(push.tag, push.index, "link down", push.peer, quiet))

    def tick(self, now: float) -> None:
        self.now = now
        self.machine.tick(now)

    @property
    def notices(self) -> list[Any]:
        self.machine.audit()
        return self.machine.take_notices()
