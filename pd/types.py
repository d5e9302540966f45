"""Plain values shared by every layer. No behaviour beyond validation, no imports from pd except errors."""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

#: Number of one request inside one instance, minted by the api process: worker id << 40 | counter. Never reused.
#: It stays below 1 << 54: the scheduler puts the choice above, where a request has several.
RequestKey = NewType("RequestKey", int)


#: Most choices (`n`) of one prompt.
MAX_CHOICES = 128

#: Most steps of one trace: to write more would keep the runner from its work, and its peers waiting, for too long.
MAX_PROFILE_STEPS = 500


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class InstanceState(enum.Enum):
    """What a peer may expect. Travels in heartbeats only (and in Hello's answer)."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class FinishReason(enum.Enum):
    """`STOP` covers end-of-sequence, stop ids and stop strings; `ABORT` a cancel or a client's disconnect."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class HandoffId(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Minted by the decode instance. A new attempt of the same request is a new id with the same counter."""

    incarnation: int
    counter: int
    attempt: int

    @property
    def tag(self) -> int:
        """uint64 by which transfer backends know this hand-off; unique among one receiver's incarnation."""
        return (self.counter << 8) | (self.attempt & 0xFF)


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are drawn. Everything that the full API needs; the api validates ranges.

    `temperature` 0 means greedy. `top_k` 0 and `top_p` 1 mean off. `seed` is set (D mints one where the client gave
    none). Random numbers are keyed by (seed, choice, position), so they do not depend on batch or instance.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    max_tokens: int = 0  # resolved before it reaches the scheduler: > 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # includes the model's end tokens unless ignore_eos
    ignore_eos: bool = False
    logprobs: bool = False  # the sampled token's
    top_logprobs: int = 0  # that many alternatives besides
    token_ids_logprob: tuple[int, ...] = ()
    grammar: str = ""  # as llguidance takes it; what follows the prompt matches it. "" means unconstrained


class BlockShape(msgspec.Struct, frozen=True):
    """What one KV block is: `[kv_head, layer, k|v, token, head_dim]`, contiguous. Sizes of one rank's slice."""

    tokens: int
    kv_heads: int
    layers: int
    head_dim: int
    itemsize: int

    @property
    def head_bytes(self) -> int:
        """Bytes of one kv head of one block: the smallest piece that tensor-parallel slicing moves."""
        return self.layers * 2 * self.tokens * self.head_dim * self.itemsize

    @property
    def nbytes(self) -> int:
        return self.kv_heads * self.head_bytes


class ModelInfo(msgspec.Struct, frozen=True):
    """What the rest of the system must know of a model, read from its directory without torch."""

    name: str  # as served: --served-model-name or the path as given
    path: str
    architecture: str
    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: str  # resolved: float32 | float16 | bfloat16
    eos_token_ids: tuple[int, ...]
    fingerprint: str  # of config and weights (sizes and headers), dtype included
    kv_dtype: str = ""  # of the KV cache where it is not dtype: fp8_e4m3
    kv_scales: tuple[tuple[float, float], ...] = ()  # of each layer's keys and values, if kv_dtype is; () is all 1

    @property
    def cache_dtype(self) -> str:
        """What KV blocks hold."""
        return self.kv_dtype or self.dtype


class Load(msgspec.Struct, frozen=True, array_like=True):
    """What an instance says of itself in heartbeats, /server_info and to policies. Counts, never rates."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    queued_tokens: int = 0  # prompt tokens accepted and not yet computed
