"""Stopping a run by a signal: SIGTERM from a cluster's scheduler, or SIGINT from Ctrl-C."""

import os
import signal
from types import FrameType


class StopSignals:
    """Records the first SIGTERM or SIGINT, so that the current step can finish. A SIGINT after it stops the process at
    once. A SIGTERM doesn't, because a scheduler and torchrun both send one to every process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.received is None:
            self.received = signal.Signals(number)
            # Not print, which the signal may have interrupted.
            os.write(2, f"\n{self.received.name}: finishing this step; press Ctrl-C to stop at once\n".encode())
