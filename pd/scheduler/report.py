"""What the scheduler says of itself: to peers, to /server_info, to /metrics, to the audit."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from pd.messages import InstanceInfo, KvGroup, RankInfo, Rejected, RunnerReady, Unwelcome
from pd.scheduler.actions import RefusePeer, Reply
from pd.scheduler.blocks import STATES
from pd.scheduler.core import Core
from pd.scheduler.decode_side import DecodeSide
from pd.scheduler.handoff import (
    DecodeHandoffs,
    DecodeState,
    HandoffConfig,
    LocalIdentity,
    PrefillHandoffs,
    PrefillState,
)
from pd.scheduler.prefill_side import PrefillSide
from pd.scheduler.request import State
from pd.types import InstanceState, Load, Role

#: Names the order of a block's dimensions; peers must agree.
LAYOUT = "block,kv_head,layer,kv,token,head_dim"

#: Least seconds between two audits of an instance by itself: each looks at every block (1-2 ms for 100,000).
AUDIT_INTERVAL = 10.0

#: States of hand-offs, on either side, that outlive their request.
ENDING = frozenset(
    state.value for state in (DecodeState.DRAINING, DecodeState.QUARANTINED, PrefillState.LANDED, PrefillState.STOPPING)
)


def local_identity(core: Core, ready: RunnerReady) -> LocalIdentity:
    settings, model = core.settings, ready.model
    rank = RankInfo(0, ready.rank, ready.layers, ready.kv_heads, ready.identity, ready.descriptor)
    scales = _digest(model.kv_scales)
    group = KvGroup(0, ready.layers, core.page_size, model.head_dim, model.cache_dtype, scales)
    return LocalIdentity(
        instance=settings.instance,
        incarnation=settings.incarnation,
        fingerprint=model.fingerprint,
        block_tokens=core.page_size,
        layout=LAYOUT,
        digest=ready.digest,
        transfer=settings.transfer,
        lanes=1,
        ranks=[rank],
        groups=[group],
        http=settings.http,
        vocab_size=model.vocab_size,
    )


def _digest(scales: Sequence[tuple[float, float]]) -> str:
    """Peers whose scales differ would read other numbers than were written."""
    flat = [scale for pair in scales for scale in pair]
    if all(scale == 1 for scale in flat):
        return ""
    return hashlib.blake2b(array("d", flat).tobytes(), digest_size=8).hexdigest()


def make_sides(core: Core, ready: RunnerReady) -> tuple[DecodeSide | None, PrefillSide | None]:
    """The half of the hand-off that this instance's role plays; unified plays none."""
    settings = core.settings
    if settings.role is Role.UNIFIED:
        return None, None
    control, identity = settings.control, local_identity(core, ready)
    config = HandoffConfig(
        heartbeat_interval=control.heartbeat_interval,
        heartbeat_max_failure=control.heartbeat_max_failure,
        connect_timeout=control.connect_timeout,
        waiting_timeout=control.waiting_timeout,
        step_timeout=settings.scheduler.step_timeout,
    )
    if settings.role is Role.DECODE:
        return DecodeSide(core, DecodeHandoffs(core.out, core.pool, identity, config)), None
    return None, PrefillSide(core, PrefillHandoffs(core.out, identity, config))


def rejection(key: int, status: int, message: str, param: str | None, code: str | None) -> Reply:
    return Reply(key >> 40, Rejected(key, status, message, param, code))


def not_a_prefill(conn: int, state: InstanceState) -> RefusePeer:
    starting = state is InstanceState.STARTING
    return RefusePeer(conn, Unwelcome("state" if starting else "role", "starting" if starting else "not prefill"))


class Reporter:
    """Publishes load when it changed, at most once per tick, and answers questions."""

    def __init__(self, core: Core, decode: DecodeSide | None, prefill: PrefillSide | None) -> None:
        self.core, self.decode, self.prefill = core, decode, prefill
        self.paused = False
        self._last: tuple[InstanceState, Load, bool] | None = None
        self._audited, self._audited_at = self._mark(), float("-inf")

    def load(self) -> Load:
        core = self.core
        asked = self.decode.asked if self.decode is not None else 0
        return Load(
            running=core.batcher.count,
            waiting=len(core.waiting) + core.grammars.held + asked,
            free_blocks=core.pool.available,
            total_blocks=core.pool.total,
            queued_tokens=core.waiting.tokens,
        )

    def credit(self) -> int:
        """Prompt tokens that may still be asked of this instance: twice its step budget less what is queued."""
        return max(0, 2 * self.core.settings.max_prefill_tokens - self.core.waiting.tokens)

    def publish(self, now: float, state: InstanceState, *, force: bool = False) -> None:
        load = self.load()
        if self.prefill is not None:
            self.prefill.handoffs.set_status(now, state, load, self.credit())
        if self.decode is not None:
            self.decode.handoffs.set_status(now, state, load, 0)
        if force or (state, load, self.paused) != self._last:
            self._last = (state, load, self.paused)
            core = self.core
            endpoint = core.settings.control_endpoint
            info = InstanceInfo(state, load, endpoint, core.capacity_tokens, core.page_size, self.paused)
            self.core.out.append(Reply(-1, info))  # to every api worker

    def answer(self, what: str) -> dict[str, object]:
        if what == "flush_cache":
            return {"freed_blocks": self.core.prefix.flush()}
        if what == "audit":
            return self.audit()
        return self.metrics()

    def metrics(self) -> dict[str, object]:
        core, stats = self.core, self.core.stats
        handoffs = self.decode or self.prefill
        side = handoffs.handoffs if handoffs is not None else None
        return {
            "kv_blocks": dict(zip(STATES, core.pool.counts, strict=True)),
            "requests": self._states(),
            "kv_pushed_bytes": self.prefill.handoffs.pushed_bytes if self.prefill is not None else 0,
            "kv_landed_bytes": self.decode.handoffs.landed_bytes if self.decode is not None else 0,
            "prompt_tokens": {"computed": stats.computed, "cached": stats.cached, "landed": stats.landed},
            "handoffs": dict(side.outcomes) if side is not None else {},
            "stale_messages": dict(side.counts.stale) if side is not None else {},
            "steps": stats.steps,
            "compute_us": stats.compute_us,
            "late_tokens": stats.late_tokens,
            "audit_failures": stats.audit_failures,
            "retractions": core.batcher.retractions,
            "loop_lag": self._lag(),
        }

    def _lag(self) -> dict[str, float]:
        """How late the scheduler's loop was over the last minute, seconds."""
        lags = sorted(self.core.stats.lags) or [0.0]
        return {"p50": lags[len(lags) // 2], "p99": lags[int(len(lags) * 0.99)], "max": lags[-1]}

    def _states(self) -> dict[str, int]:
        states = {state.value: 0 for state in State if state is not State.GONE}
        for request in self.core.requests.values():
            states[request.state.value] += 1
        return states

    def audit(self) -> dict[str, object]:
        figures = books(self.core, self.decode, self.prefill)
        if not figures["balanced"]:
            self.core.stats.audit_failures += 1
        return figures

    def audit_when_idle(self, now: float) -> None:
        """Audit once after work has ended, at most every AUDIT_INTERVAL: a busy service is idle again and again."""
        if self.core.idle and now - self._audited_at >= AUDIT_INTERVAL and self._mark() != self._audited:
            self._audited, self._audited_at = self._mark(), now
            figures = self.audit()
            if not figures["balanced"]:
                self.core.log("audit_failed", "error", **figures)

    def _mark(self) -> tuple[int, ...]:
        """Changes with whatever may unbalance the books."""
        return self.core.added, *self.core.pool.counts


def books(core: Core, decode: DecodeSide | None, prefill: PrefillSide | None) -> dict[str, object]:
    """The pool's figures, recounted, against what the hand-offs hold; `balanced`, or what the `problem` is."""
    counts = dict(zip(STATES, core.pool.counts, strict=True))
    figures: dict[str, object] = {**counts, "total": core.pool.total, "idle": core.idle, "balanced": True}
    try:
        if decode is not None:
            states = decode.handoffs.audit().states  # with the pool
        else:
            states = prefill.handoffs.audit() if prefill is not None else {}
            if prefill is not None:
                prefill.rooms.audit(id for ids in states.values() for id in ids)
                figures["rooms"] = len(prefill.rooms)
            core.pool.audit()
            strangers = counts["incoming"] + counts["quarantined"]
            assert not strangers, f"{strangers} blocks are granted by an instance that grants none"
        figures["handoffs"] = {state: len(ids) for state, ids in states.items()}
        if core.idle:
            assert not counts["owned"], f"{counts['owned']} blocks are owned, and nothing is here to own them"
            wanted = sum(len(ids) for state, ids in states.items() if state not in ENDING)
            assert not wanted, f"{wanted} hand-offs go on without a request"
    except AssertionError as error:
        figures |= {"balanced": False, "problem": str(error)}
    return figures
