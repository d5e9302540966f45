"""Every message between pd's processes: tagged msgspec structs, no pickle.

Three families share this module because they share values:

- api <-> scheduler (ZMQ ipc): `Submit`, `Abort`, `Ask`, `Pause`, â¦ / `StepOutputs`, `Rejected`, `Answer`, â¦
- scheduler <-> runner (ZMQ ipc): `StepOrder` / `StepDone`, `GrammarCompile` / `GrammarCompiled` and
  `StartProfile`, `StopProfile` / `ProfileAnswer` on one socket, the `Transferâ¦` messages on another.
- scheduler <-> scheduler (ZMQ tcp, the control plane): `Hello` … `Goodbye`, each in an `Envelope`.

Raw arrays: a field named `…_i32`, `…_i64`, `…_u8`, `…_f32` is the little-endian bytes of such an array. Ids and tokens
travel like this because an object per token or per request is what makes a Python scheduler slow.
Deadlines travel as remaining milliseconds and become local monotonic times.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from pd.types import FinishReason, HandoffId, InstanceState, Load, ModelInfo, SamplingParams

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base: the class name is the tag."""


# --- values inside messages -----------------------------------------------------------------------------------------


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Alternatives at consecutive positions: `ids_i32` and `logprobs_f32` are row-major [positions, width]."""

    width: int
    ids_i32: bytes
    logprobs_f32: bytes


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of prompt tokens `start`.. given what precedes them; position 0 has none and is NaN.

    `logprobs_f32` [n], `tops` [n, width] or None; `wanted_f32` [n, len(token_ids_logprob)] or empty.
    """

    start: int
    logprobs_f32: bytes
    tops: TopLogprobs | None = None
    wanted_f32: bytes = b""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of the tokens that one request got in one step: `chosen_f32` [k]; tops [k, width]; wanted [k, ids]."""

    chosen_f32: bytes
    tops: TopLogprobs | None = None
    wanted_f32: bytes = b""


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a choice ended. `stop_id` is the stop token id that matched; `message` explains ABORT and ERROR."""

    reason: FinishReason
    stop_id: int | None = None
    message: str = ""
    status: int = 200  # HTTP status for ERROR when nothing was streamed yet


# --- api -> scheduler -----------------------------------------------------------------------------------------------


class Submit(Message):
    """One prompt. With `choices` > 1 the choices share the prompt's blocks; output names them by index.

    `logprob_start` >= 0 asks for prompt logprobs from that position. `prefills` are control endpoints in order of
    preference ("tcp://host:port"); empty means local. `client_timeout_ms` bounds the whole request, `idle_timeout_ms`
    the time without a new token. `salt` separates prefix caches (adapter, media, tenant). `room` >= 0 is the label of
    a foreign router's two-leg request. `probe`: a health check, computed here whatever the role.
    """

    key: int
    rid: str
    tokens_i32: bytes
    sampling: SamplingParams
    choices: int = 1
    logprob_start: int = -1
    prompt_top_logprobs: int = 0
    prefills: tuple[str, ...] = ()
    client_timeout_ms: int | None = None
    idle_timeout_ms: int = 600_000
    priority: int = 0
    salt: str = ""
    room: int = -1
    probe: bool = False


class Abort(Message):
    """`choice` -1 ends every choice of the request."""

    key: int
    reason: str = "cancelled by the client"
    choice: int = -1


class Ask(Message):
    """A question from an HTTP operation; answered by `Answer`. `what`: info | metrics | audit | flush_cache."""

    token: int
    what: str


class AbortMatching(Message):
    """End requests, of every api worker, by their client's id: "" ends all. Answered by `Answer` {"aborted": count}.

    The prompts of a batch without ids of their own are called ID-0, ID-1, …: ID ends them all.
    """

    token: int
    rid: str


class Pause(Message):
    """Order no more steps until `Continue`. `mode`: abort ends every request first, retract takes the running ones out
    of the batch (their blocks go to the prefix cache), in_place leaves them where they are. Answered by `Answer`.
    """

    token: int
    mode: str


class Continue(Message):
    """Answered by `Answer`."""

    token: int


class ProfileWish(msgspec.Struct, frozen=True, array_like=True):
    """What is to be recorded of a runner's steps, and where to.

    `activities`: CPU, GPU (empty: what there is). `output_dir` on the runner's host ("": the instance's own). Recording
    begins at once, or with step `start_step` of the instance, and ends by itself after `num_steps` (0: as many as a
    trace may have). With `stages` (prefill, decode) each has a trace of its own, of so many steps. A file's name has
    `prefix` and `id` ("": the time).
    """

    activities: tuple[str, ...] = ()
    output_dir: str = ""
    num_steps: int = 0
    start_step: int = 0
    stages: tuple[str, ...] = ()
    with_stack: bool = False
    record_shapes: bool = True
    prefix: str = ""
    id: str = ""


class StartProfile(Message):
    """Api -> scheduler, answered by `Answer`; and, with a token of its own, scheduler -> runner: `ProfileAnswer`."""

    token: int
    wish: ProfileWish


class StopProfile(Message):
    """As `StartProfile`. The answer comes when the traces are written; it is also that of one that ended by itself."""

    token: int


# --- scheduler -> api -----------------------------------------------------------------------------------------------


class Started(msgspec.Struct, frozen=True, array_like=True):
    """Sent once per request with its first output. `prefill` is the peer's HTTP name, "" when local."""

    key: int
    cached_tokens: int
    prefill: str = ""
    prompt_logprobs: PromptLogprobs | None = None


class Finished(msgspec.Struct, frozen=True, array_like=True):
    key: int
    choice: int
    finish: Finish


class LogprobRow(msgspec.Struct, frozen=True, array_like=True):
    index: int  # row of the step's arrays
    logprobs: TokenLogprobs


class StepOutputs(Message):
    """Everything that one step means to one api worker, in one message.

    Row i: request `keys_i64[i]`, choice `choices_u8[i]` (empty: all 0), `counts_u8[i]` tokens, taken in order from
    `tokens_i32`. `started` applies before the rows, `finished` after them (a request may finish without a row).
    """

    keys_i64: bytes
    counts_u8: bytes
    tokens_i32: bytes
    choices_u8: bytes = b""
    logprobs: list[LogprobRow] = []
    started: list[Started] = []
    finished: list[Finished] = []


class Rejected(Message):
    """A `Submit` that was never admitted: HTTP `status`, OpenAI `code`, the field at fault if any."""

    key: int
    status: int
    message: str
    param: str | None = None
    code: str | None = None


class Answer(Message):
    token: int
    data: dict[str, object]


class InstanceInfo(Message):
    """Scheduler -> api on every change (and at start): what /server_info, /health and /metrics show."""

    state: InstanceState
    load: Load
    control_endpoint: str = ""  # "tcp://host:port" where this instance answers Hello; prefill only
    max_total_tokens: int = 0
    page_size: int = 0
    paused: bool = False


class Drain(Message):
    """Parent -> scheduler: finish what runs, refuse new work, exit within `bound_ms`."""

    bound_ms: int


# --- scheduler -> runner --------------------------------------------------------------------------------------------


class Admit(msgspec.Struct, frozen=True, array_like=True):
    """A request enters the runner's batch state. The runner keeps it, its tokens and its block table until released.

    `tokens_i32` is everything known: prompt, then tokens emitted earlier (a retry or replay). `prompt_len` is the
    original prompt's length, from which penalties, `min_tokens` and grammar count. The KV of the first `computed`
    tokens is already in `blocks_i32`. `epoch` tells this admission from an earlier one of the same key.
    `logprob_start` >= 0: prompt logprobs from that position are returned as their positions are computed.
    `choices` tokens are sampled at the first sampled position; each choice is then admitted as a request of its own.
    """

    key: int
    epoch: int
    tokens_i32: bytes
    prompt_len: int
    computed: int
    blocks_i32: bytes
    sampling: SamplingParams
    choices: int = 1
    logprob_start: int = -1
    prompt_top_logprobs: int = 0


class CopyBlock(msgspec.Struct, frozen=True, array_like=True):
    """Before the step: copy the first `tokens` tokens of block `src` into `dst` (a partial block shared by choices)."""

    src: int
    dst: int
    tokens: int


class Push(msgspec.Struct, frozen=True, array_like=True):
    """Send blocks to a peer: `src_i32[i]` here becomes `dst_i32[i]` there. Several per hand-off, numbered by `index`.

    Riding on a step order it starts when that step is done; sent on the transfer socket it starts at once.
    `peer` is the receiver's identity; `tag` the hand-off's; `lane`, `group` address the pools.
    """

    peer: str
    tag: int
    index: int
    src_i32: bytes
    dst_i32: bytes
    lane: int = 0
    group: int = 0


class StepOrder(Message):
    """One step for every rank of an instance. Deltas only: the runner keeps state between steps.

    Order of application: `release`, `admit`, growth, `copies`, then compute. Row i computes `counts_i32[i]` more
    tokens of `rows_i64[i]`: the next ones of its known tokens, or, when all known are computed, its last sampled token
    (kept on the device). A token is sampled where `sample_u8[i]` is 1: the row's last position is then its last known
    token. Positions that have no block write to scratch block 0. `grow_keys_i64`/`grow_blocks_i32`: block appended to
    that request's table. `complete_i32`/`complete_tokens_i32`: blocks (and their valid tokens) that this step
    completes and whose digest is wanted. `bucket` is the lanes' common batch size (0: no lanes).
    """

    step: int
    rows_i64: bytes
    counts_i32: bytes
    sample_u8: bytes
    release: list[int] = []
    admit: list[Admit] = []
    grow_keys_i64: bytes = b""
    grow_blocks_i32: bytes = b""
    copies: list[CopyBlock] = []
    complete_i32: bytes = b""
    complete_tokens_i32: bytes = b""
    pushes: list[Push] = []
    lane: int = 0
    bucket: int = 0


class GrammarCompile(Message):
    """Compile this grammar beside the steps, for requests to be admitted later. Answered by GrammarCompiled.

    One that was compiled already, and is kept, is answered at once. A request whose grammar is not kept any more is
    admitted all the same: its first sample waits.
    """

    number: int
    grammar: str


class PromptRow(msgspec.Struct, frozen=True, array_like=True):
    index: int
    logprobs: PromptLogprobs


class FailedRow(msgspec.Struct, frozen=True, array_like=True):
    """A row whose token means nothing: its request cannot go on. The others are sound."""

    index: int
    reason: str


class StepDone(Message):
    """Result of one step, one message. Row i of the order: `counts_u8[i]` tokens from `tokens_i32`, in order.

    Results match by (key, epoch, step), never by slot. `digests_u64[i]` belongs to `complete_i32[i]` of the order.
    `compute_us` is the step's own time. `failed` rows have a token like the others, which is to be ignored.
    """

    step: int
    rank: int
    keys_i64: bytes
    epochs_i32: bytes
    counts_u8: bytes
    tokens_i32: bytes
    logprobs: list[LogprobRow] = []
    prompt_logprobs: list[PromptRow] = []
    digests_u64: bytes = b""
    compute_us: int = 0
    failed: list[FailedRow] = []


class GrammarCompiled(Message):
    """`problem` says why no request can have this grammar; "" means that they can."""

    number: int
    problem: str = ""


class ProfileAnswer(Message):
    """`problem` says why not, `param` which of the wish's fields is at fault; `files` are the traces of a stop."""

    token: int
    problem: str = ""
    param: str = ""
    files: list[str] = []
    status: int = 400  # of a problem


class ProfileBusy(Message):
    """The runner ends a recording, which takes seconds in which no thread of it gets to do anything; and is done."""

    busy: bool


class RunnerReady(Message):
    """First message of a runner on the step socket: what it allocated and how peers reach its memory."""

    rank: int
    num_blocks: int  # scratch block 0 included
    identity: str
    descriptor: bytes
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    block_bytes: int
    digest: str  # name of the digest function: peers must agree
    model: ModelInfo


class RunnerFailed(Message):
    """A step or start-up raised; the instance ends. `reason` is one line, the traceback is in the runner's log."""

    rank: int
    reason: str


# --- scheduler <-> runner, transfer socket --------------------------------------------------------------------------
# Every rank gets every command. `rank` of an event is the local rank that speaks.


class TransferConnect(Message):
    """Import a peer's descriptor. Answered by TransferConnected, or TransferPeerLost.

    `kv_heads`: the half-open range of kv heads that the peer's blocks hold; (0, 0) means the same as here.
    """

    peer: str
    descriptor: bytes
    kv_heads: tuple[int, int] = (0, 0)


class TransferConnected(Message):
    peer: str
    rank: int = 0


class TransferPeerLost(Message):
    peer: str
    reason: str
    rank: int = 0


class TransferGrant(Message):
    """Receiver: hand-off `tag` of `sender` may write `blocks_i32` (all of each block) from now on."""

    sender: str
    tag: int
    blocks_i32: bytes
    lane: int = 0
    group: int = 0


class TransferRevoke(Message):
    """Receiver: take a grant back. Answered by TransferRevoked.

    `over`: the sender said that nothing with this tag can land any more; forget the grant whatever the backend says.
    """

    sender: str
    tag: int
    over: bool = False


class TransferRevoked(Message):
    """`quiet`: nothing with this tag can land any more."""

    tag: int
    quiet: bool
    sender: str = ""
    rank: int = 0


class TransferPush(Message):
    """Sender: start now (blocks whose writing step is done)."""

    push: Push


class TransferPushed(Message):
    """Sender: every write of this push has been applied at the destination, `micros` after it could begin."""

    tag: int
    index: int
    nbytes: int
    peer: str = ""
    rank: int = 0
    micros: int = 0


class TransferFailed(Message):
    """Sender: this push failed. `quiet`: it never started. Otherwise writes may be in flight until TransferReset."""

    tag: int
    index: int
    reason: str
    peer: str = ""
    quiet: bool = False
    rank: int = 0


class TransferCancel(Message):
    """Sender: post nothing more for this tag. Pushes in flight still report Pushed or Failed; queued ones fail."""

    peer: str
    tag: int


class TransferResetPeer(Message):
    """Sender: stop reading local memory for this peer. Answered by TransferReset; every push to it has then ended."""

    peer: str


class TransferReset(Message):
    peer: str
    rank: int = 0


class TransferVerify(Message):
    """Receiver: fence `sender`, then compare the digests of `blocks_i32` (valid tokens each) with `digests_u64`.

    Ends the tag's grant first: nothing lands after it was verified. `kv_heads` is the sender's half-open range (its
    slice of each block is compared); (0, 0) means all heads of this rank. Empty `digests_u64`: only compute.
    """

    sender: str
    tag: int
    blocks_i32: bytes
    tokens_i32: bytes
    digests_u64: bytes
    lane: int = 0
    group: int = 0
    kv_heads: tuple[int, int] = (0, 0)


class TransferVerified(Message):
    """`bad_i32`: the blocks whose digest differed (empty: all good). `error` is set when the fence failed.

    `digests_u64`: what was computed here, in the order asked.
    """

    tag: int
    bad_i32: bytes
    nbytes: int
    error: str = ""
    sender: str = ""
    digests_u64: bytes = b""
    rank: int = 0


class TransferExpel(Message):
    """Receiver: shut out a dead sender incarnation. Answered by TransferExpelled."""

    sender: str


class TransferExpelled(Message):
    """`quiet`: nothing from that incarnation can land here any more."""

    sender: str
    quiet: bool
    rank: int = 0


# --- control plane, scheduler <-> scheduler -------------------------------------------------------------------------


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Wraps every control message. `seq` counts from 0 per session and direction; a gap ends the session."""

    session: int
    seq: int
    body: bytes


class RankInfo(msgspec.Struct, frozen=True, array_like=True):
    """One rank: which layers and kv heads (half-open ranges) its slice holds, and how its memory is reached."""

    lane: int
    rank: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    identity: str
    descriptor: bytes  # begins with a checksum of itself


class KvGroup(msgspec.Struct, frozen=True, array_like=True):
    """A set of layers that share a block table. Dense models have one.

    `dtype` is that of keys and values in their blocks; `scales` a digest of what they stand for, "" if for themselves.
    """

    group: int
    layers: tuple[int, int]
    block_tokens: int
    head_dim: int
    dtype: str
    scales: str = ""


class Hello(Message):
    """First message of a decode instance to a prefill instance's listening socket.

    `outstanding` lists hand-offs of which this side still holds incoming blocks. It only decides when old blocks are
    quiet: the answer's `writing` lists which of them the prefill instance may still write. Nothing here proves the
    cluster secret: the connection that carries it does (CURVE), and data connections do so by themselves.
    """

    protocol: int
    instance: str
    incarnation: int
    fingerprint: str
    block_tokens: int
    layout: str
    digest: str
    transfer: str
    lanes: int
    ranks: list[RankInfo]
    groups: list[KvGroup]
    outstanding: list[HandoffId] = []
    heartbeat_ms: int = 5000


class Welcome(Message):
    """Answer to Hello: the session's own socket and what the prefill instance is."""

    session: int
    endpoint: str
    instance: str
    incarnation: int
    ranks: list[RankInfo]
    state: InstanceState
    credit_tokens: int
    writing: list[HandoffId] = []
    http: str = ""


class Unwelcome(Message):
    """Answer to Hello when the two instances do not fit. `field` names the mismatch."""

    field: str
    problem: str


class Dest(msgspec.Struct, frozen=True, array_like=True):
    """Where blocks go: one per (lane, group). `blocks_i32[i]` receives the prompt's block `first_block + i`."""

    lane: int
    group: int
    blocks_i32: bytes
    generations_i32: bytes


class Prefill(Message):
    """Decode asks. Compute `tokens_i32`, push blocks from `first_block` on, sample the next position.

    `tokens_i32` is prompt + emitted tokens; `prompt_len` the original prompt's length. `logprob_start` as in Submit
    (-1 on a retry whose prompt logprobs already came). `rid` is the client request's id, for log lines.
    """

    id: HandoffId
    tokens_i32: bytes
    prompt_len: int
    sampling: SamplingParams
    first_block: int
    dests: list[Dest]
    remaining_ms: int
    choices: int = 1
    logprob_start: int = -1
    prompt_top_logprobs: int = 0
    priority: int = 0
    salt: str = ""
    room: int = -1
    rid: str = ""


class FirstChoice(msgspec.Struct, frozen=True, array_like=True):
    token: int
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None


class FirstToken(Message):
    """The moment it is sampled, before the last block has landed."""

    id: HandoffId
    choices: list[FirstChoice]
    cached_tokens: int
    prompt_logprobs: PromptLogprobs | None = None


class Landed(Message):
    """The last write of one sending rank has been applied. `digests_u64[i]` of block `first_block + i` (its slice)."""

    id: HandoffId
    rank: int
    digests_u64: bytes
    nbytes: int


class LandedAck(Message):
    """D has taken note (and needs nothing more of this hand-off); P may forget it."""

    id: HandoffId


class Refused(Message):
    """Nothing was ever written. `why` is busy | draining | mismatch."""

    id: HandoffId
    why: str
    detail: str = ""


class Failed(Message):
    """Early news: P will not complete this hand-off. Cancelled follows when no write can be in flight."""

    id: HandoffId
    reason: str
    retryable: bool


class Cancel(Message):
    id: HandoffId


class Cancelled(Message):
    """No write of this hand-off can be in flight, now or later."""

    id: HandoffId


class Answered(Message):
    """A request with a room was answered without this prefill instance: its waiting leg gets this result.

    Without `choices` it failed: `reason` and `status` say how. `prompt` is the label of its prompt, `index` 0: the
    prompts of a batch have a room each.
    """

    room: int
    index: int
    choices: list[FirstChoice]
    reason: str = ""
    status: int = 200
    prompt: bytes = b""
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None


class Expect(Message):
    """Decode holds a request with this room and will ask; until then its leg shares the fate of this session."""

    room: int


class Heartbeat(Message):
    """Both directions. Carries load, state and the sender's credit; nothing else carries state."""

    state: InstanceState
    load: Load
    credit_tokens: int = 0


class Goodbye(Message):
    """Orderly end of a session; `reason` for the log."""

    reason: str


Command: TypeAlias = AbortMatching | Pause | Continue
ProfileCommand: TypeAlias = StartProfile | StopProfile
ApiToScheduler: TypeAlias = Submit | Abort | Ask | Drain | AbortMatching | Pause | Continue | StartProfile | StopProfile
SchedulerToApi: TypeAlias = StepOutputs | Rejected | Answer | InstanceInfo
SchedulerToRunner: TypeAlias = StepOrder | GrammarCompile | StartProfile | StopProfile
RunnerToScheduler: TypeAlias = StepDone | GrammarCompiled | ProfileAnswer | ProfileBusy | RunnerReady | RunnerFailed
TransferCommand: TypeAlias = (
    TransferConnect
    | TransferGrant
    | TransferRevoke
    | TransferPush
    | TransferCancel
    | TransferResetPeer
    | TransferVerify
    | TransferExpel
)
TransferEvent: TypeAlias = (
    TransferConnected
    | TransferPeerLost
    | TransferRevoked
    | TransferPushed
    | TransferFailed
    | TransferReset
    | TransferVerified
    | TransferExpelled
)
Opening: TypeAlias = Hello | Welcome | Unwelcome
PeerMessage: TypeAlias = (
    Prefill
    | FirstToken
    | Landed
    | LandedAck
    | Refused
    | Failed
    | Cancel
    | Cancelled
    | Answered
    | Heartbeat
    | Goodbye
    | Expect
)
