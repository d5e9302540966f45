"""The hand-off of a prompt's KV blocks from a prefill to a decode instance: two pure state machines.

    decode                                   prefill
    Hello, Welcome                           one session per pair; a gap or a reconnect ends it, nothing is resent
    Prefill (where every block goes)  ──►    refused, or accepted into the queue
                                      ◄──    FirstToken, the moment it is sampled
    (blocks are written)              ◄══    one-sided writes, as the steps that computed them end
                                      ◄──    Landed per sending rank, when the last write has been applied
    fence, digest, Ready; LandedAck   ──►    forgotten

Neither machine has a clock, a socket or a coroutine. Events are methods that take `now`; orders are appended to the
list `out` given at construction; what concerns a request is drained with `take_notices`. Transitions are in
`decode_table` and `prefill_table`, sessions in `decode_peers` and `prefill_peers`.
"""

from pd.scheduler.decode_table import DECODE_TABLE, DecodeAudit, DecodeEvent, DecodeState
from pd.scheduler.handoff_base import (
    Accepted,
    AskSpec,
    AttemptFailed,
    Choice,
    ChoiceKind,
    FirstTokenCame,
    GrantReturned,
    HandoffConfig,
    LocalIdentity,
    Ready,
    RoomAnswered,
    RoomExpected,
    RoomsLost,
    SourceFree,
    Stop,
    UndefinedTransition,
)
from pd.scheduler.handoff_decode import DecodeHandoffs
from pd.scheduler.handoff_prefill import PrefillHandoffs
from pd.scheduler.prefill_table import PREFILL_TABLE, PrefillEvent, PrefillState

__all__ = [
    "DECODE_TABLE",
    "PREFILL_TABLE",
    "Accepted",
    "AskSpec",
    "AttemptFailed",
    "Choice",
    "ChoiceKind",
    "DecodeAudit",
    "DecodeEvent",
    "DecodeHandoffs",
    "DecodeState",
    "FirstTokenCame",
    "GrantReturned",
    "HandoffConfig",
    "LocalIdentity",
    "PrefillEvent",
    "PrefillHandoffs",
    "PrefillState",
    "Ready",
    "RoomAnswered",
    "RoomExpected",
    "RoomsLost",
    "SourceFree",
    "Stop",
    "UndefinedTransition",
]
