"""Where shots begin and end, from local evidence only.

A cut at n lies between the frames n-1 and n. It is known from the frame properties that scene filters set, from a
built-in detector, from a change of the prompt, or from the forced grid of `max_shot`. Nothing looks farther than
`REACH` frames (`REACH + FORCED` with `max_shot`), so what is decided for a frame never depends on the rest of the clip.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from vsuav.tiling import WINDOW

FLASH = 4
"""The detector takes the largest difference within this many frames, so that a flash is not two shots."""
FORCED = 12
"""A forced cut keeps this far away from real ones."""
FAR = WINDOW + 1
"""How far from a frame the ends of its shot are looked for; farther away no window or chunk of it depends on them."""
REACH = FAR - 1 + FLASH
"""How far from a frame evidence is read to know its shot."""


@dataclass(frozen=True, slots=True)
class Record:
    """The evidence of one frame.

    `difference` is the mean absolute luma difference to the frame before (0…1); `cut_before` and `cut_after` are what
    the frame's properties say (None: nothing); `prompt` is the frame's own prompt (None: the one of the settings);
    `digest` is the digest of its pixels if a disk tier is on.
    """

    difference: float = 0.0
    cut_before: bool | None = None
    cut_after: bool | None = None
    prompt: str | None = None
    digest: bytes | None = None


class Records:
    """A bounded memo of records by frame number, safe to use from many threads."""

    def __init__(self, limit: int):
        self._limit = limit
        self._records: OrderedDict[int, Record] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, frame: int, record: Record) -> None:
        with self._lock:
            self._records[frame] = record
            self._records.move_to_end(frame)
            while len(self._records) > self._limit:
                self._records.popitem(last=False)

    def take(self, frames: range) -> dict[int, Record] | None:
        """The records of `frames` as one consistent picture, or None if any is missing."""
        with self._lock:
            if any(n not in self._records for n in frames):
                return None
            for n in frames:
                self._records.move_to_end(n)
            return {n: self._records[n] for n in frames}

    def missing(self, frames: range) -> list[int]:
        with self._lock:
            return [n for n in frames if n not in self._records]


class Shots:
    """The shots of a clip of `frames` frames.

    Args:
        frames: length of the clip.
        record: evidence of a frame; asked only for frames within the reach named at the top of this file.
        prompt_at: the prompt of a frame that brings none of its own.
        detect: False ignores properties and the detector; then only prompts and `max_shot` cut.
        threshold: of the detector, 0…1.
        max_shot: spacing of the forced cuts in frames, a multiple of 6, or None.
    """

    def __init__(
        self,
        frames: int,
        record: Callable[[int], Record] = lambda n: Record(),
        prompt_at: Callable[[int], str] = lambda n: "",
        detect: bool = True,
        threshold: float = 0.1,
        max_shot: int | None = None,
    ):
        self.frames = frames
        self._record = record
        self._prompt_at = prompt_at
        self._detect = detect
        self._threshold = threshold
        self._max_shot = max_shot
        self._cuts: dict[int, bool] = {}

    def prompt(self, frame: int) -> str:
        """The prompt of `frame`: its own, or the one of the settings."""
        own = self._record(frame).prompt
        return self._prompt_at(frame) if own is None else own

    def digest(self, frame: int) -> bytes:
        """The digest of a frame's pixels; empty where none was made."""
        return self._record(frame).digest or b""

    def cut(self, n: int) -> bool:
        """Whether a shot begins at frame n; the ends of the clip, 0 and `frames`, are cuts."""
        if n <= 0 or n >= self.frames:
            return True
        if n not in self._cuts:
            self._cuts[n] = self._real(n) or self._forced(n)
        return self._cuts[n]

    def shot(self, frame: int) -> tuple[int, int]:
        """``(start, stop)`` of the shot of `frame`; an end more than `FAR` frames away is given as `FAR` away."""
        start = next((n for n in range(frame, frame - FAR, -1) if self.cut(n)), frame - FAR)
        stop = next((n for n in range(frame + 1, frame + FAR) if self.cut(n)), frame + FAR)
        return start, stop

    def clamp(self, frame: int, other: int) -> int:
        """The frame nearest to `other` on the way from `frame` without leaving the shot of `frame`."""
        if other > frame:
            return next((n - 1 for n in range(frame + 1, other + 1) if self.cut(n)), other)
        return next((n for n in range(frame, other, -1) if self.cut(n)), other)

    def _real(self, n: int) -> bool:
        if n <= 0 or n >= self.frames or self.prompt(n - 1) != self.prompt(n):
            return True
        if not self._detect:
            return False
        said = (self._record(n - 1).cut_after, self._record(n).cut_before)
        if said != (None, None):
            return any(said)
        here = self._record(n).difference
        around = range(max(1, n - FLASH), min(self.frames, n + FLASH + 1))
        return here > self._threshold and all(
            self._record(m).difference < here or (m >= n and self._record(m).difference <= here) for m in around
        )

    def _forced(self, n: int) -> bool:
        if not self._max_shot or n % self._max_shot:
            return False
        return not any(self._real(m) for m in range(n - FORCED, n + FORCED + 1))
