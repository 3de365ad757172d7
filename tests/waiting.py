"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool]) -> None:
    """Check a condition every 2 ms until it holds, for at least two minutes."""
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("timed out")
