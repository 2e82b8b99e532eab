"""Whose turn it is: one thread a device computes, and jobs reach it in an order that suits an encode and an editor.

All computing of a device happens on one thread of ours. So two jobs never share the device, the number of threads
torch uses is that thread's own, and a request that waits for its result holds nothing that another one needs.
"""

import atexit
import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from vsuav import buffers, openmp

JOBS, IDLE = 8, 1.0
"""Jobs after which a worker gives free memory back, and seconds without one. Fetching it again takes a twentieth of a
job's time."""
NEIGHBOURS = 16
"""Requests of one clip whose positions lie this close belong to one run through it."""


@contextlib.contextmanager
def working_threads(threads: int) -> Iterator[None]:
    """Compute with a number of threads that is fixed, because float32 results depend on it."""
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)


class Cancelled(RuntimeError):
    """The job's owner went away before it was done."""


@dataclass(eq=False)
class Job:
    """One piece of work: `run` is called on the worker's thread; `position` is its place in the clip of `owner`."""

    owner: object
    position: int
    arrival: int
    run: Callable[[], Any]
    result: Future = field(default_factory=Future)


def next_job(waiting: list[Job]) -> Job:
    """The job to run now: of the most recently asked run of neighbours, the one that comes first in its clip.

    An encode asks for neighbours all the time and gets them in order; after a seek in an editor, the newest place is
    served before what was left waiting.
    """
    newest = max(waiting, key=lambda job: job.arrival)
    run = sorted((job for job in waiting if job.owner is newest.owner), key=lambda job: job.position)
    first = place = run.index(newest)
    while place > 0 and run[place].position - run[place - 1].position <= NEIGHBOURS:
        place -= 1
        first = place
    return run[first]


class Worker:
    """A thread that runs jobs one at a time, in the order of `next_job`."""

    def __init__(self, name: str):
        self._name = name
        self._waiting: list[Job] = []
        self._arrivals = 0
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], Any], owner: object = None, position: int = 0) -> Any:
        """Run `work` on the worker's thread, wait for it, and return what it returns or raise what it raises."""
        if threading.current_thread() is self._thread:
            return work()
        with self._condition:
            self._arrivals += 1
            job = Job(owner, position, self._arrivals, work)
            self._waiting.append(job)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
            self._condition.notify_all()
        try:
            return job.result.result()
        finally:
            job.run = job.owner = None

    def stop(self) -> None:
        """End the thread after the job at hand and fail the jobs that wait; a later `run` starts a new thread."""
        with self._condition:
            thread, self._thread = self._thread, None
            waiting, self._waiting = self._waiting, []
            self._condition.notify_all()
        for job in waiting:
            job.result.set_exception(Cancelled("the worker was stopped"))
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        mine, done = threading.current_thread(), 0  # jobs since memory was given back
        openmp.fix()
        while True:
            with self._condition:
                ready = lambda: bool(self._waiting) or self._thread is not mine  # noqa: E731
                asked = self._condition.wait_for(ready, IDLE if done else None)
                if self._thread is not mine:
                    return
                if asked:
                    job = next_job(self._waiting)
                    self._waiting.remove(job)
            if asked:
                try:
                    job.result.set_result(job.run())
                except BaseException as error:
                    job.result.set_exception(error)
                del job
                done += 1
            if not asked or done == JOBS:
                give_back_memory(idle=not asked)
                done = 0


def give_back_memory(idle: bool) -> None:
    """Let glibc return free pages to the system; else frames and latents of all sizes leave ever more holes behind."""
    (buffers.let_go if idle else buffers.tidy)()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


leaving = threading.Event()
"""Set when the interpreter ends: the job at hand is to end with its task."""
_workers: dict[str, Worker] = {}
_workers_lock = threading.Lock()


def worker(device: str) -> Worker:
    """The one worker of `device` in this process."""
    with _workers_lock:
        if device not in _workers:
            _workers[device] = Worker(f"vsuav {device}")
        return _workers[device]


@atexit.register
def leave() -> None:
    """Stop every worker's thread, for good."""
    leaving.set()
    with _workers_lock:
        workers = list(_workers.values())
    for each in workers:
        each.stop()
