"""A runner without a model: every step takes the same time, and each row's token tells which step it came from.

When a step's tokens left is written to a file beside the sockets, so that who receives a token knows its age: the
monotonic clock is the same in all processes of one machine.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np
import zmq

from pd.child import ChildContext
from pd.ipc.channel import SyncChannel
from pd.ipc.codec import Codec
from pd.ipc.zmq import LinkOptions, Sockets
from pd.messages import RunnerReady, RunnerToScheduler, StepDone, StepOrder
from pd.models.info import check_model
from pd.runner.config import RunnerConfig

STEP_S = 0.02
STEPS = 1 << 16  # that the file has room for
#: Bytes that JSON does not escape: the token ids, and the texts, of steps in turn.
SYMBOLS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BLOCKS = 1 << 15


def times_file(folder: Path) -> Path:
    return folder / "sent"


def main(config: RunnerConfig, context: ChildContext) -> None:
    """Process target, in the place of pd.runner.service:main."""
    folder = Path(config.step_endpoint.removeprefix("ipc://")).parent
    with times_file(folder).open("w+b") as file:
        file.truncate(8 * STEPS)
        sent = memoryview(mmap.mmap(file.fileno(), 8 * STEPS)).cast("d")
    sockets = Sockets()
    link = sockets.dial(zmq.PAIR, config.step_endpoint, LinkOptions(heartbeat=0, high_water=1000, linger=1.0))
    results: Codec[RunnerToScheduler] = Codec(RunnerToScheduler)
    orders: Codec[StepOrder] = Codec(StepOrder)
    channel = SyncChannel(link, results, orders, "steps")
    info = check_model(config.model.model)
    ready = RunnerReady(0, BLOCKS, config.identity, b"", (0, 1), (0, 1), 4096, "scripted", info)
    channel.send(ready, 10.0)
    context.report_ready({})
    epochs: dict[int, int] = {}
    poller = zmq.Poller()
    poller.register(channel.link.socket, zmq.POLLIN)
    poller.register(context.stop_fd, zmq.POLLIN)
    due = time.monotonic()
    while not context.stop_requested():
        order = channel.recv(0)
        if order is None:
            poller.poll()
            continue
        due = max(time.monotonic(), due + STEP_S)
        time.sleep(max(0.0, due - time.monotonic()))
        done = _done(order, epochs)
        sent[order.step % STEPS] = time.monotonic()
        channel.send(done, 10.0)
    channel.close()
    sockets.close()


def _done(order: StepOrder, epochs: dict[int, int]) -> StepDone:
    for key in order.release:
        epochs.pop(key, None)
    for admit in order.admit:
        epochs[admit.key] = admit.epoch
    keys = np.frombuffer(order.rows_i64, "<i8").tolist()
    tokens = np.full(sum(order.sample_u8), SYMBOLS[order.step % len(SYMBOLS)], dtype="<i4")
    epochs_i32 = np.array([epochs[key] for key in keys], dtype="<i4").tobytes()
    return StepDone(order.step, 0, order.rows_i64, epochs_i32, order.sample_u8, tokens.tobytes())
