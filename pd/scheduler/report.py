"""What the scheduler says of itself: to peers, to /server_info, to /metrics, to the audit."""

from __future__ import annotations

from pd.messages import InstanceInfo, KvGroup, RankInfo, Rejected, RunnerReady, Unwelcome
from pd.scheduler.actions import RefusePeer, Reply
from pd.scheduler.core import Core
from pd.scheduler.decode_side import DecodeSide
from pd.scheduler.handoff import DecodeHandoffs, HandoffConfig, LocalIdentity, PrefillHandoffs
from pd.scheduler.prefill_side import PrefillSide
from pd.scheduler.request import State
from pd.types import InstanceState, Load, Role

#: Names the order of a block's dimensions; peers must agree.
LAYOUT = "block,kv_head,layer,kv,token,head_dim"


def local_identity(core: Core, ready: RunnerReady) -> LocalIdentity:
    settings, model = core.settings, ready.model
    rank = RankInfo(0, ready.rank, ready.layers, ready.kv_heads, ready.identity, ready.descriptor)
    group = KvGroup(0, ready.layers, core.page_size, model.head_dim, model.dtype)
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
    )


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
        self._last: tuple[InstanceState, Load] | None = None

    def load(self) -> Load:
        core = self.core
        asked = self.decode.asked if self.decode is not None else 0
        return Load(
            running=core.batcher.count,
            waiting=len(core.waiting) + asked,
            free_blocks=core.pool.available,
            total_blocks=core.pool.total,
            queued_tokens=core.waiting.tokens,
        )

    def credit(self) -> int:
        """Prompt tokens that may still be asked of this instance: twice its step budget less what is queued."""
        return max(0, 2 * self.core.settings.scheduler.max_prefill_tokens - self.core.waiting.tokens)

    def publish(self, now: float, state: InstanceState, *, force: bool = False) -> None:
        load = self.load()
        if self.prefill is not None:
            self.prefill.handoffs.set_status(now, state, load, self.credit())
        if self.decode is not None:
            self.decode.handoffs.set_status(now, state, load, 0)
        if force or (state, load) != self._last:
            self._last = (state, load)
            core = self.core
            info = InstanceInfo(state, load, core.settings.control_endpoint, core.capacity_tokens, core.page_size)
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
        counts = core.pool.counts
        side = handoffs.handoffs if handoffs is not None else None
        return {
            "kv_blocks": dict(zip(("free", "owned", "cached", "incoming", "quarantined"), counts, strict=True)),
            "requests": self._states(),
            "kv_pushed_bytes": self.prefill.handoffs.pushed_bytes if self.prefill is not None else 0,
            "kv_landed_bytes": self.decode.handoffs.landed_bytes if self.decode is not None else 0,
            "prompt_tokens": {"computed": stats.computed, "cached": stats.cached, "landed": stats.landed},
            "handoffs": dict(side.outcomes) if side is not None else {},
            "stale_messages": dict(side.counts.stale) if side is not None else {},
            "steps": stats.steps,
            "compute_us": stats.compute_us,
            "late_tokens": stats.late_tokens,
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
        """The pool's books, recounted, and whether they balance."""
        try:
            figures: dict[str, object] = dict(self.core.pool.audit())
        except AssertionError as error:
            return {"balanced": False, "problem": str(error), "total": self.core.pool.total}
        figures["total"] = self.core.pool.total
        figures["balanced"] = True
        figures["idle"] = not self.core.requests and not self.core.batcher.busy
        return figures
