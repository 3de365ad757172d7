"""How the time of work on a text grows with the text."""

import time
from collections.abc import Callable

SHORT, LONG = 30_000, 250_000


def assert_time_is_not_quadratic(work: Callable[[str], object], text_of: Callable[[int], str]) -> None:
    """Do the work on two texts, which `text_of` makes of about this number of characters.

    The processor time of linear work is 8 times as long for the second text, that of quadratic work 70 times.
    """

    def seconds(text: str) -> float:
        started = time.process_time()
        work(text)
        return time.process_time() - started

    short = min(seconds(text_of(SHORT)) for _ in range(2))
    assert seconds(text_of(LONG)) < 30 * short + 0.05
