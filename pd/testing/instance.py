"""One scheduler with a fake runner, in process and without time: for unit tests and scripted scenarios."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from pd import messages as m
from pd.config import CacheConfig, SchedulerConfig
from pd.scheduler import events as ev
from pd.scheduler.actions import Action, Log, Reply, RunStep
from pd.scheduler.core import SchedulerSettings
from pd.scheduler.state import Scheduler
from pd.testing.fake_runner import FakeRunner, prompt_logprobs, reference_tokens, token_logprobs
from pd.types import ModelInfo, Role, SamplingParams

TINY_MODEL = ModelInfo("fake", "", "Fake", 60_000, 4096, 1, 1, 1, 1, 1, "float32", (), "fake")


def settings(role: Role = Role.UNIFIED, page_size: int = 4, **scheduler: object) -> SchedulerSettings:
    return SchedulerSettings(
        role,
        "instance",
        1,
        "direct",
        scheduler=replace(SchedulerConfig(), **scheduler),  # type: ignore[arg-type]
        cache=CacheConfig(page_size=page_size),
    )


def runner_ready(num_blocks: int, identity: str = "instance/1/0") -> m.RunnerReady:
    return m.RunnerReady(0, num_blocks, identity, identity.encode(), (0, 1), (0, 1), 64, "fake", TINY_MODEL)


@dataclass
class Client:
    """What one request's client saw; of several choices the first, `others` are the rest."""

    tokens: list[int] = field(default_factory=list)
    started: m.Started | None = None
    finish: m.Finish | None = None
    rejected: m.Rejected | None = None
    logprobs: list[m.TokenLogprobs] = field(default_factory=list)
    others: list[Client] = field(default_factory=list)

    @classmethod
    def of(cls, choices: int) -> Client:
        return cls(others=[cls() for _ in range(choices - 1)])

    @property
    def choices(self) -> list[Client]:
        return [self, *self.others]

    def fail(self, message: str, status: int) -> None:
        """Every choice that is not over ends with this error."""
        for choice in self.choices:
            if not choice.over:
                choice.finish = m.Finish(m.FinishReason.ERROR, message=message, status=status)

    def check(self, name: str, prompt: list[int], sampling: SamplingParams, count: int) -> None:
        """Every token of every choice is the right one; one that is done has all `count` of them, or up to a stop."""
        for index, choice in enumerate(self.choices):
            want = reference_tokens(prompt, msgspec.structs.replace(sampling, choice=index), count)
            assert choice.tokens == want[: len(choice.tokens)], f"choice {index} of {name}: wrong tokens"
            if choice.finish is not None and choice.finish.reason in (m.FinishReason.STOP, m.FinishReason.LENGTH):
                assert choice.tokens == want, f"choice {index} of {name}: {len(choice.tokens)} of {len(want)} tokens"

    def check_logprobs(self, name: str, prompt: list[int], sampling: SamplingParams, start: int) -> None:
        """Each token has its own logprobs, if any are wanted, and so have the prompt's."""
        for index, choice in enumerate(self.choices):
            want = [token_logprobs([token], sampling) for token in choice.tokens] if sampling.logprobs else []
            assert choice.logprobs == want, f"choice {index} of {name}: wrong logprobs"
        if self.started is not None:
            found = self.started.prompt_logprobs
            expected = prompt_logprobs(prompt, start, len(prompt)) if start >= 0 else None
            assert found == expected, f"{name}: wrong logprobs of the prompt"

    @property
    def over(self) -> bool:
        """This choice."""
        return self.finish is not None or self.rejected is not None

    @property
    def ended(self) -> bool:
        """Every choice."""
        return self.rejected is not None or all(choice.over for choice in self.choices)


def note_reply(clients: dict[int, Client], message: m.SchedulerToApi) -> None:
    """Write down what a message to the api means to its clients; asserts the order that clients rely on."""
    if isinstance(message, m.Rejected):
        clients[message.key].rejected = message
    if not isinstance(message, m.StepOutputs):
        return
    for started in message.started:
        assert clients[started.key].started is None, "started twice"
        clients[started.key].started = started
    keys = np.frombuffer(message.keys_i64, "<i8").tolist()
    tokens, at = np.frombuffer(message.tokens_i32, "<i4").tolist(), 0
    rows = [
        clients[key].choices[choice] for key, choice in zip(keys, message.choices_u8 or bytes(len(keys)), strict=True)
    ]
    for key, client, count in zip(keys, rows, message.counts_u8, strict=True):
        assert not client.over, f"request {key} got a token after its end"
        assert clients[key].started is not None
        client.tokens += tokens[at : at + count]
        at += count
    for row in message.logprobs:
        rows[row.index].logprobs.append(row.logprobs)
    for finished in message.finished:
        client = clients[finished.key].choices[finished.choice]
        assert not client.over, f"choice {finished.choice} of request {finished.key} ended twice"
        client.finish = finished.finish


@dataclass
class Instance:
    """Drives a scheduler and its fake runner. The runner finishes a step only when asked (`finish_step`)."""

    config: SchedulerSettings = field(default_factory=settings)
    num_blocks: int = 65
    now: float = 0.0
    clients: dict[int, Client] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.config)
        self.runner = FakeRunner(self.num_blocks, self.config.cache.page_size)
        self.handle(ev.RunnerUp(self.now, runner_ready(self.num_blocks)))

    # --- events ---

    def handle(self, event: ev.Event) -> list[Action]:
        actions = self.scheduler.handle(event)
        self.actions += actions
        for action in actions:
            if isinstance(action, RunStep):
                self.runner.step(action.order)
            elif isinstance(action, Reply):
                note_reply(self.clients, action.message)
            elif isinstance(action, Log):
                self.logs.append(action)
        return actions

    def submit(
        self,
        key: int,
        prompt: Iterable[int],
        max_tokens: int = 8,
        *,
        seed: int = 0,
        stop: tuple[int, ...] = (),
        choices: int = 1,
        grammar: str = "",
        sampling: dict[str, Any] | None = None,
        **more: Any,
    ) -> Client:
        params = SamplingParams(
            seed=seed, max_tokens=max_tokens, stop_token_ids=stop, grammar=grammar, **(sampling or {})
        )
        client = self.clients[key] = Client.of(choices)
        tokens = np.array(list(prompt), dtype="<i4").tobytes()
        submit = m.Submit(key, f"r{key}", tokens, params, choices, **more)
        self.handle(ev.RequestSubmitted(self.now, submit))
        return client

    def finish_step(self) -> list[Action]:
        return self.handle(ev.StepFinished(self.now, self.runner.finish()))

    def run(self, steps: int = 10_000) -> None:
        """Until the runner has nothing left to do."""
        while self.runner.pending:
            steps -= 1
            assert steps > 0, "the instance does not come to rest"
            self.finish_step()

    def tick(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.handle(ev.Tick(self.now))

    def audit(self) -> dict[str, int]:
        assert self.scheduler.core is not None
        return self.scheduler.core.pool.audit()
