"""Being asked to stop: SIGTERM, as a cluster's scheduler sends it, and SIGINT, as Ctrl-C does."""

import signal
from types import FrameType


class StopSignals:
    """Notes a first SIGTERM or SIGINT, so that the work at hand can be finished; a second one stops it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()
