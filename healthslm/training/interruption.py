"""Being asked to stop: SIGTERM, as a cluster's scheduler sends it, and SIGINT, as Ctrl-C does."""

import os
import signal
from types import FrameType


class StopSignals:
    """Notes the first SIGTERM or SIGINT and says so, so that the work at hand can be finished. A SIGINT after it stops
    it at once; a SIGTERM does not, since a scheduler and torchrun each send their own to every process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.received is None:
            self.received = signal.Signals(number)
            # Not by print, which may be what the signal came into.
            os.write(2, f"\n{self.received.name}: finishing this update; SIGINT stops at once\n".encode())
