"""Traces of this process's steps, on request: torch's profiler, one recording at a time, files in Chrome's format.

Recording begins and ends between two steps, on the thread that computes: of the CPU's work it sees what that thread
does, of a GPU's all that this process launches. To end it holds the interpreter for 3 us an event, 10 with shapes, and
3 more for the JSON (measured with torch 2.13). So a trace has a bound, the scheduler is told not to take the silence
for a hang, and only the compression is left to a thread, since nothing else could run beside it.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from pd import logs
from pd.messages import (
    ProfileAnswer,
    ProfileBusy,
    ProfileWish,
    RunnerToScheduler,
    StartProfile,
    StepOrder,
    StopProfile,
)
from pd.types import MAX_PROFILE_STEPS

#: How SGLang's files call the stages.
_SUFFIXES = {"": "", "prefill": "-EXTEND", "decode": "-DECODE"}

#: The JSON repeats itself: more effort gains little.
_COMPRESSION = 1


@dataclass(eq=False)
class _Session:
    """From a start to the answer of its stop. `left`: by stage ("" without stages) the steps that it still records."""

    wish: ProfileWish
    folder: Path
    left: dict[str, int]
    activities: list[ProfilerActivity]
    record: torch.profiler.profile | None = None
    stage: str = ""
    writing: int = 0
    files: list[str] = field(default_factory=list)
    problem: str = ""
    stopped: int | None = None  # token of the stop that waits for the files


class _Unable(Exception):
    """Why not, and which of the wish's fields is at fault."""

    def __init__(self, problem: str, param: str = "") -> None:
        self.problem, self.param = problem, param
        super().__init__(problem)


class Profiler:
    """`label` names this runner in files, `folder` is where they go by default, `say` sends to the scheduler.

    All methods belong to the thread that computes. `written_fd` is readable when `written` has something to do.
    """

    def __init__(self, label: str, folder: str, say: Callable[[RunnerToScheduler], None]) -> None:
        self.written_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._label, self._folder, self._say = re.sub(r"[^A-Za-z0-9_.-]", "_", label), folder, say
        self._log = logs.get_logger()
        self._session: _Session | None = None
        self._span: torch.profiler.record_function | None = None
        self._results: SimpleQueue[tuple[_Session, str, str]] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, "profile")

    # --- what is asked -----------------------------------------------------------------------------------------------

    def command(self, command: StartProfile | StopProfile) -> None:
        """Whatever is wrong becomes the answer's problem."""
        try:
            if isinstance(command, StartProfile):
                self._start(command.wish)
                self._say(ProfileAnswer(command.token))
            else:
                self._stop(command.token)
        except _Unable as error:
            self._say(ProfileAnswer(command.token, error.problem, error.param))

    def _start(self, wish: ProfileWish) -> None:
        session = self._session
        if session is not None and (session.left or session.stopped is not None):
            raise _Unable("a profile is being recorded already: stop it first")
        steps = wish.num_steps or MAX_PROFILE_STEPS
        left = dict.fromkeys(wish.stages or ("",), steps)
        session = _Session(wish, _writable(wish.output_dir or self._folder), left, _activities(wish.activities))
        if not wish.start_step and not wish.stages:
            self._begin(session, "")
        self._session = session
        self._log.info("profile_started", folder=str(session.folder), steps=steps, pid=os.getpid())

    def _stop(self, token: int) -> None:
        session = self._session
        if session is None or session.stopped is not None:
            raise _Unable("no profile is being recorded: start one first")
        session.stopped = token
        if session.record is not None:
            self._end(session)
        session.left.clear()
        self._answer(session)

    def _answer(self, session: _Session) -> None:
        """The stop's, once there is one and all is written. A session that nobody asks for is replaced by the next."""
        if session.stopped is not None and not session.writing:
            self._say(ProfileAnswer(session.stopped, session.problem, files=session.files, status=500))
            self._session = None

    # --- steps -------------------------------------------------------------------------------------------------------

    def before(self, order: StepOrder) -> None:
        """A step comes."""
        session, rows = self._session, len(order.rows_i64) // 8
        if session is None or not session.left or not rows or order.step < session.wish.start_step:
            return
        counts = np.frombuffer(order.counts_i32, dtype=np.int32)
        # A last prompt token alone counts as decode, which is what computing it costs.
        stage = "" if not session.wish.stages else "prefill" if counts.max() > 1 else "decode"
        if session.record is not None and session.stage != stage:
            self._end(session)
        if session.record is None and stage in session.left:
            try:
                self._begin(session, stage)
            except _Unable as error:
                session.problem = error.problem
                session.left.clear()
        if session.record is not None:
            self._span = torch.profiler.record_function(f"pd step {order.step}: {rows} rows, {counts.sum()} tokens")
            self._span.__enter__()

    def after(self) -> None:
        """It is done, and its result on the way."""
        session = self._session
        if self._span is None or session is None:
            return
        self._span.__exit__(None, None, None)
        self._span = None
        session.left[session.stage] -= 1
        if not session.left[session.stage]:
            self._end(session)

    def written(self) -> None:
        """Take note of what the thread has done."""
        while not self._results.empty():
            os.eventfd_read(self.written_fd)
            session, path, problem = self._results.get()
            session.writing -= 1
            if problem:
                session.problem = problem
                self._log.error("profile_failed", path=path, reason=problem)
            else:
                session.files.append(path)
                self._log.info("profile_written", path=path)
            self._answer(session)

    def close(self) -> None:
        """What is being recorded is lost; what is being written is finished."""
        if self._session is not None and self._session.record is not None:
            self._session.record.stop()
        self._thread.shutdown()
        os.close(self.written_fd)

    # --- recording ---------------------------------------------------------------------------------------------------

    def _begin(self, session: _Session, stage: str) -> None:
        wish = session.wish
        record = torch.profiler.profile(
            activities=session.activities,
            with_stack=wish.with_stack,
            record_shapes=wish.record_shapes,
            acc_events=True,  # torch 2.11 warns without it, though there is one cycle only
        )
        try:
            record.start()
        except RuntimeError as error:  # another one records in this process
            raise _Unable(f"the profiler does not start: {error}") from error
        session.record, session.stage = record, stage

    def _end(self, session: _Session) -> None:
        """The trace of one stage is complete: to a file, and on to the thread."""
        record, session.record = session.record, None
        assert record is not None
        session.left.pop(session.stage, None)
        prefix, name = session.wish.prefix, session.wish.id or f"{time.time():.6f}"
        stem = (f"{prefix}-" if prefix else "") + f"{self._label}-{name}{_SUFFIXES[session.stage]}"
        path = session.folder / f"{stem}.trace.json.gz"
        raw = session.folder / f".{stem}.trace.json"
        self._say(ProfileBusy(True))
        try:
            record.stop()
            record.export_chrome_trace(str(raw))
        except (RuntimeError, OSError) as error:
            session.problem = f"the trace could not be written: {error}"
            self._log.error("profile_failed", path=str(path), reason=str(error))
        else:
            session.writing += 1
            self._thread.submit(self._compress, session, raw, path)
        finally:
            self._say(ProfileBusy(False))

    def _compress(self, session: _Session, raw: Path, path: Path) -> None:
        """On the thread. The file has its name only once it is whole."""
        part, problem = raw.with_suffix(".part"), ""
        try:
            with raw.open("rb") as source, gzip.open(part, "wb", compresslevel=_COMPRESSION) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            part.replace(path)
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror}"
            part.unlink(missing_ok=True)
        raw.unlink(missing_ok=True)
        os.eventfd_write(self.written_fd, 1)
        self._results.put((session, str(path), problem))


def _writable(folder: str) -> Path:
    try:
        path = Path(folder).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _Unable(f"output_dir: cannot write to {folder}: {reason}", "output_dir") from error


def _activities(wanted: tuple[str, ...]) -> list[ProfilerActivity]:
    """A GPU's only where this process computes on one."""
    here = {"CPU": ProfilerActivity.CPU}
    if torch.cuda.is_initialized():
        here["GPU"] = ProfilerActivity.CUDA
    found = [here[name] for name in dict.fromkeys(wanted or tuple(here)) if name in here]
    if not found:
        raise _Unable(f"activities: {', '.join(wanted)}, but this instance computes on the CPU", "activities")
    return found
