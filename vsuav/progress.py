"""What a running clip tells of itself: tasks done and left, and frames a second, at most once a second."""

import time
from collections import deque
from collections.abc import Callable

from vsuav.tiling import BLOCK

Report = Callable[[int, int, float], None]
RECENT = 8
"""Blocks that the speed is taken from."""


class Progress:
    """Writes lines such as ``frames 12 to 17: task 5 of 20, 15 left, 1.93 frames/s``.

    Args:
        say: takes a line.
        interval: seconds between two lines at least.
        clock: seconds that never run backwards.
        copies: how many times every block is computed, as a rule, before a frame of it is there.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        copies: int = 1,
    ):
        self._say, self._interval, self._clock, self._copies = say, interval, clock, copies
        self._said = clock()
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT * copies)

    def block(self, block: int, frames: int = BLOCK) -> Report:
        """What to call after every task of a block of so many frames: tasks done, tasks in all, seconds so far.

        The speed is that of computing alone: time in which nothing was asked for does not count.
        """

        def report(done: int, total: int, seconds: float) -> None:
            pace = [*self._recent, (frames * done / total, seconds)]
            if done == total:
                self._recent.append((frames, seconds))
            now = self._clock()
            if now - self._said < self._interval:
                return
            self._said = now
            spent = sum(took for _, took in pace)
            speed = f", {sum(count for count, _ in pace) / self._copies / spent:.2f} frames/s" if spent else ""
            first = block * BLOCK
            self._say(f"frames {first} to {first + frames - 1}: task {done} of {total}, {total - done} left{speed}")

        return report


__all__ = ["Progress"]
