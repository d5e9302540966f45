"""Several choices of one prompt (`n` > 1): computed and pushed once, then decoded as requests of their own.

    prompt (a Request with choices = n) ──first tokens──► n members, each a Request with its own tokens and key
       │ computed here: shared out at once          each emits its token; one that ends with it is gone
       │ on its way: members wait in LANDING
       └── KV is there ──► full blocks shared, the partial one copied, members decode; the prompt is gone

From its first token on a choice is an emitted fact: whatever fails later, it is replayed by itself, from the prompt and
its own tokens, and samples the next position as the choice that it is. A prompt that fails before stays one request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pd.messages import Finish, FirstChoice, TokenLogprobs, TopLogprobs
from pd.scheduler.core import Core
from pd.scheduler.request import ALL_BUT_LAST, CHOICE_SHIFT, CLIENT_KEY, Family, Request, State

if TYPE_CHECKING:
    from pd.scheduler.decode_side import DecodeSide


def name_rows(keys_i64: bytes) -> tuple[bytes, bytes]:
    """The runner's keys as the api knows them: (its own keys, the choice of each row)."""
    keys = np.frombuffer(keys_i64, "<i8")
    choices = np.maximum(keys >> CHOICE_SHIFT, 1) - 1
    return (keys & CLIENT_KEY).tobytes(), choices.astype("u1").tobytes()


def of_each(logprobs: TokenLogprobs | None, count: int) -> list[TokenLogprobs | None]:
    """The logprobs of `count` tokens, token by token."""
    if logprobs is None or count == 1:
        return [logprobs] * count
    tops, wanted = logprobs.tops, len(logprobs.wanted_f32) // count
    found: list[TokenLogprobs | None] = []
    for at in range(count):
        own = None
        if tops is not None:
            part = slice(4 * tops.width * at, 4 * tops.width * (at + 1))
            own = TopLogprobs(tops.width, tops.ids_i32[part], tops.logprobs_f32[part])
        chosen = logprobs.chosen_f32[4 * at : 4 * (at + 1)]
        found.append(TokenLogprobs(chosen, own, logprobs.wanted_f32[wanted * at : wanted * (at + 1)]))
    return found


class Choices:
    """From a prompt's first tokens to its choices, and how requests end that may have several."""

    def __init__(self, core: Core, decode: DecodeSide | None) -> None:
        self.core, self.decode = core, decode

    def first(self, now: float, prompt: Request, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> None:
        """The first tokens, one per choice, wherever they were sampled. Each becomes a request."""
        core, family = self.core, prompt.family
        assert family is not None
        prompt.heard_at = now
        core.outputs.started(prompt)
        firsts = []
        for index, (token, row) in enumerate(zip(tokens, logprobs, strict=True)):
            raw = token.to_bytes(4, "little", signed=True)
            choice = family.members[index] = _fork(prompt, index, raw)
            core.adopt(choice, now)
            core.outputs.row(choice, raw, row)
            finish = choice.finish_of(token) or family.unwanted.get(index)
            if finish is not None:
                core.finish(choice, finish)
            firsts.append(FirstChoice(token, row, finish))
        if prompt.leg:
            assert self.decode is not None
            self.decode.answer_leg(prompt, firsts)
        if not family.members:
            self._drop(now, prompt, "every choice finished with its first token")
        elif prompt.handoff is None:
            share_out(core, prompt)

    def abort(self, now: float, key: int, choice: int, finish: Finish) -> bool:
        """End one choice of the api's request `key`, or all (-1). False: what is over already is over."""
        family = self.core.families.get(key)
        if family is None:
            request = self.core.requests.get(key)
            if request is None or choice > 0 or (choice == 0 and request.choices > 1):
                return False
            self.end(now, request, finish)
        elif choice < 0:
            self.end_all(now, family.prompt or next(iter(family.members.values())), finish)
        elif choice in family.members:
            self.end(now, family.members[choice], finish)
        else:
            return self._end_early(now, family, choice, finish)
        return True

    def _end_early(self, now: float, family: Family, choice: int, finish: Finish) -> bool:
        """One that has not begun ends with its first token, unless it is the last that is wanted."""
        prompt = family.prompt
        if prompt is None or prompt.started or choice >= prompt.choices:
            return False
        family.unwanted[choice] = finish
        if len(family.unwanted) == prompt.choices:
            self.end_all(now, prompt, finish)
        return True

    def end(self, now: float, request: Request, finish: Finish) -> None:
        """A request, or one choice, ends for a reason outside of its tokens. The last one takes its prompt along."""
        reason = finish.message or finish.reason.value
        if self.decode is not None:
            self.decode.drop(now, request, reason)
        self.core.finish(request, finish)
        family = request.family
        if family is not None and family.prompt is not None and not family.members:
            self._drop(now, family.prompt, reason)

    def end_all(self, now: float, request: Request, finish: Finish) -> None:
        """A request ends with all of its choices."""
        if request.state is State.GONE:
            return
        for one in living(request):
            self.end(now, one, finish)

    def _drop(self, now: float, prompt: Request, reason: str) -> None:
        """No choice is left that its KV would be for."""
        if self.decode is not None:
            self.decode.drop(now, prompt, reason)
        _forget(self.core, prompt)


def living(request: Request) -> list[Request]:
    """What stands for the request: itself, or its choices once there are any."""
    family = request.family
    if family is None or not family.members:
        return [request]
    return list(family.members.values())


def fail(core: Core, request: Request, message: str, status: int) -> None:
    """The request, which has no hand-off any more, ends: a prompt with all of its choices, a choice alone.

    Of the others one may have a hand-off of its own.
    """
    is_prompt = request.family is not None and request.family.prompt is request
    ends = living(request) if is_prompt else [request]
    for one in ends:
        core.fail(one, message, status)
    if request not in ends:
        _forget(core, request)


def share_out(core: Core, prompt: Request) -> None:
    """The prompt's KV is here: its living choices decode from it, and the prompt is gone.

    Ownership: each choice takes a reference on every full block. The partial block goes to the oldest choice, a copy to
    each other one: all write their next token behind it. A choice for whose copy there is no block is retracted.
    """
    full, tail = divmod(prompt.known, core.page_size)
    shared, partial = prompt.blocks[:full], prompt.blocks[full:]
    for place, choice in enumerate(living(prompt)):
        own: list[int] | None = partial
        if tail and place:
            own = core.pool.allocate(1)
        else:
            core.pool.retain(partial)
        if own is None:
            core.batcher.retractions += 1
            core.requeue(choice)
            continue
        core.pool.retain(shared)
        choice.blocks = shared + own
        core.batcher.enter(choice, prompt.known)
        if own is not partial:
            core.batcher.copy(choice, partial[0], tail)
        choice.done = ALL_BUT_LAST
        core.batcher.cache(choice, prompt.known)
    _forget(core, prompt)


def scatter(core: Core, prompt: Request) -> None:
    """The prompt's KV will not come, but its choices have begun: each is replayed and keeps the pin on the prefix."""
    for choice in living(prompt):
        core.pool.retain(prompt.blocks)
        choice.blocks, choice.inserted = prompt.blocks[:], prompt.inserted
        choice.tried = dict(prompt.tried)
        choice.replay, choice.state = True, State.WAITING
        core.waiting.push(choice)
    _forget(core, prompt)


def _fork(prompt: Request, index: int, token: bytes) -> Request:
    """The choice that `token` is the first token of. Nothing in it is shared with the others.

    It has no room: a leg that waits for the prompt's has its answer by now.
    """
    choice = Request(
        prompt.client_key + (index + 1 << CHOICE_SHIFT),
        f"{prompt.rid}-{index}",
        bytes(prompt.tokens) + token,
        prompt.prompt_len,
        msgspec.structs.replace(prompt.sampling, choice=index),
    )
    choice.family = prompt.family
    choice.state = State.LANDING
    choice.age = prompt.age + index
    choice.max_tokens = prompt.max_tokens
    choice.prefills, choice.prefill_name = prompt.prefills, prompt.prefill_name
    choice.priority, choice.salt = prompt.priority, prompt.salt
    choice.deadline, choice.idle_timeout = prompt.deadline, prompt.idle_timeout
    choice.started = True
    return choice


def _forget(core: Core, prompt: Request) -> None:
    core.batcher.leave(prompt)
    core.remove(prompt)
