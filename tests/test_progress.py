"""Progress in the log: at most a line a second, tasks done and left, frames a second of computing."""

import re
import time

import pytest
import toy
import vapoursynth as vs

from vsuav import upscale
from vsuav.progress import RECENT, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told():
    clock, lines = Clock(), []
    return clock, lines, Progress(lines.append, clock=clock)


def run(clock: Clock, report, tasks: int, each: float) -> None:
    """A block of `tasks` tasks that take `each` seconds."""
    for done in range(1, tasks + 1):
        clock.now += each
        report(done, tasks, done * each)


def test_a_line_says_tasks_and_speed(told):
    clock, lines, progress = told
    run(clock, progress.block(2), 4, 1.0)
    assert lines == [
        "frames 12 to 17: task 1 of 4, 3 left, 1.50 frames/s", "frames 12 to 17: task 2 of 4, 2 left, 1.50 frames/s",
        "frames 12 to 17: task 3 of 4, 1 left, 1.50 frames/s", "frames 12 to 17: task 4 of 4, 0 left, 1.50 frames/s",
    ]  # fmt: skip


@pytest.mark.parametrize("each", [0.01, 0.3, 0.7, 2.5])
def test_at_most_one_line_a_second(told, each):
    clock, lines, progress = told
    times = []
    progress._say = lambda line: times.append(clock.now)
    for block in range(5):
        run(clock, progress.block(block), 30, each)
    assert all(later - earlier >= 1 - 1e-9 for earlier, later in zip(times, times[1:], strict=False))
    assert len(times) >= int(150 * each / (1 + each))


def test_a_short_run_says_nothing(told):
    clock, lines, progress = told
    run(clock, progress.block(0), 9, 0.1)
    assert lines == []


def test_the_speed_is_of_recent_blocks_and_of_computing_alone(told):
    clock, lines, progress = told
    run(clock, progress.block(0), 2, 60.0)
    for block in range(1, RECENT + 1):
        clock.now += 1000  # nobody asks
        run(clock, progress.block(block), 2, 1.5)
    assert lines[-2].endswith(f"1 left, {(RECENT * 6 + 3) / (120 + 3 * (RECENT - 1) + 1.5):.2f} frames/s")
    run(clock, progress.block(RECENT + 1), 2, 1.5)
    assert lines[-1].endswith("0 left, 2.00 frames/s")


def test_no_time_is_no_speed(told):
    clock, lines, progress = told
    clock.now += 2
    progress.block(0)(1, 3, 0.0)
    assert lines == ["frames 0 to 5: task 1 of 3, 2 left"]


def test_blocks_of_copies_count_as_parts_of_frames():
    """Two copies of every block, each at six frames in four seconds: 0.75 frames of the result a second."""
    clock, lines = Clock(), []
    progress = Progress(lines.append, clock=clock, copies=2)
    for block in (0, 0, 1, 1):
        run(clock, progress.block(block), 2, 2.0)
    assert lines[0] == "frames 0 to 5: task 1 of 2, 1 left, 0.75 frames/s"
    assert all(line.endswith("0.75 frames/s") for line in lines) and len(lines) == 8


def test_copies_tell_of_themselves_together(tmp_path):
    """Four clips that each told once a second would tell four times a second."""
    lines = []
    handler = vs.core.add_log_handler(lambda kind, line: lines.append((time.monotonic(), kind, line)))
    try:
        clip = vs.core.std.BlankClip(format=vs.RGBS, width=32, height=32, length=13)
        result = upscale(clip, toy.write(tmp_path / "toy"), threads=1, device="cpu", ensemble=4)
        began = time.monotonic()
        while time.monotonic() < began + 2.5:
            result.get_frame(0)
            result.get_frame(12)
            vs.core.clear_cache()
    finally:
        vs.core.remove_log_handler(handler)
    times = [when for when, kind, _ in lines if kind == vs.MESSAGE_TYPE_INFORMATION]
    assert times and all(later - earlier > 0.5 for earlier, later in zip(times, times[1:], strict=False))


def test_a_clip_reports_to_vapoursynths_log(tmp_path, monkeypatch):
    """As information; nothing is written to stdout."""
    lines = []
    handler = vs.core.add_log_handler(lambda kind, line: lines.append((kind, line)))
    try:
        clip = vs.core.std.BlankClip(format=vs.RGBS, width=32, height=32, length=7)
        monkeypatch.setattr(Progress.__init__, "__defaults__", (0.0, *Progress.__init__.__defaults__[1:]))
        upscale(clip, toy.write(tmp_path / "toy"), threads=1, device="cpu").get_frame(6)
    finally:
        vs.core.remove_log_handler(handler)
    told = [line for kind, line in lines if kind == vs.MESSAGE_TYPE_INFORMATION]
    form = r"upscale: frames 6 to 6: task (\d+) of (\d+), (\d+) left, \d+\.\d\d frames/s"
    counts = [tuple(map(int, re.fullmatch(form, line).groups())) for line in told]
    assert counts[-1][0] == counts[-1][1] == len(counts)
    assert [done + left for done, _, left in counts] == [counts[0][1]] * len(counts)
