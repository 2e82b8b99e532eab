"""Whose turn it is: neighbours in order, newest place first, one thread, every caller its own result."""

import os
import subprocess
import sys
import threading
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vsuav import turns
from vsuav.turns import JOBS, NEIGHBOURS, Cancelled, Job, Worker, next_job


def job(owner, position, arrival):
    return Job(owner, position, arrival, lambda: None)


def order(jobs: list[Job]) -> list[tuple[object, int]]:
    waiting, served = list(jobs), []
    while waiting:
        chosen = next_job(waiting)
        waiting.remove(chosen)
        served.append((chosen.owner, chosen.position))
    return served


@given(st.permutations(range(10)))
def test_an_encode_that_prefetches_is_served_in_order(positions):
    jobs = [job("a", position, arrival) for arrival, position in enumerate(positions)]
    assert [position for _, position in order(jobs)] == list(range(10))


def test_after_a_seek_the_new_place_comes_first_and_in_order():
    jobs = [job("a", position, i) for i, position in enumerate([0, 1, 2, 501, 500])]
    assert [position for _, position in order(jobs)] == [500, 501, 0, 1, 2]


def test_the_newest_clip_comes_first():
    jobs = [job("a", 0, 0), job("b", 0, 1), job("a", 1, 2), job("b", 1, 3)]
    assert order(jobs) == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 200)), min_size=1, max_size=12))
def test_the_law_of_the_next_job(requests):
    """It is of the newest job's clip, reaches the newest by small hops, and nothing lies closely before it."""
    jobs = [job(owner, position, arrival) for arrival, (owner, position) in enumerate(requests)]
    chosen, newest = next_job(jobs), jobs[-1]
    assert chosen.owner == newest.owner
    mine = sorted(j.position for j in jobs if j.owner == newest.owner)
    between = [p for p in mine if chosen.position <= p <= newest.position]
    assert all(b - a <= NEIGHBOURS for a, b in zip(between, between[1:], strict=False))
    assert not any(chosen.position - NEIGHBOURS <= p < chosen.position for p in mine)


def test_ten_threads_get_their_own_results_from_one_thread():
    worker, used, results = Worker("test"), set(), {}

    def work(i):
        used.add(threading.get_ident())
        return i * i

    def ask(i):
        results[i] = worker.run(lambda: work(i), "clip", i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.stop()
    assert results == {i: i * i for i in range(10)}
    assert len(used) == 1
    assert not used & {thread.ident for thread in threads}


def test_waiting_jobs_run_in_their_clips_order():
    worker, served, gate = Worker("test"), [], threading.Event()
    threads = [threading.Thread(target=worker.run, args=(gate.wait, "clip", 0))]
    threads[0].start()
    while not (worker._thread and not worker._waiting):
        time.sleep(0.001)
    for position in (5, 3, 9, 1):
        thread = threading.Thread(target=worker.run, args=(lambda p=position: served.append(p), "clip", position))
        threads.append(thread)
        thread.start()
        while len(worker._waiting) < len(threads) - 1:
            time.sleep(0.001)
    gate.set()
    for thread in threads:
        thread.join()
    worker.stop()
    assert served == [1, 3, 5, 9]


def test_errors_reach_the_one_who_asked_and_nobody_else():
    worker = Worker("test")
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 / 0)
    assert worker.run(lambda: 7) == 7
    worker.stop()


def test_a_job_may_ask_for_another():
    worker = Worker("test")
    assert worker.run(lambda: worker.run(lambda: 5) + 1) == 6
    worker.stop()


def test_stopping_fails_what_waits_and_a_later_job_starts_anew():
    worker, gate, errors = Worker("test"), threading.Event(), []

    def wait_in_vain():
        try:
            worker.run(lambda: None, "clip", 1)
        except Cancelled as error:
            errors.append(error)

    first = threading.Thread(target=worker.run, args=(gate.wait, "clip", 0))
    first.start()
    while not (worker._thread and not worker._waiting):
        time.sleep(0.001)
    second = threading.Thread(target=wait_in_vain)
    second.start()
    while not worker._waiting:
        time.sleep(0.001)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    second.join()
    gate.set()
    stopper.join()
    first.join()
    assert len(errors) == 1
    assert worker.run(lambda: "again") == "again"
    worker.stop()


def test_memory_is_given_back_after_so_many_jobs_and_when_there_are_none(monkeypatch):
    given, done, told = [], [], threading.Event()
    monkeypatch.setattr(turns, "IDLE", 600)
    monkeypatch.setattr(turns, "give_back_memory", lambda idle: (given.append((len(done), idle)), told.set()))
    worker = Worker("test")
    for i in range(2 * JOBS + 3):
        worker.run(lambda i=i: done.append(i))
    worker.stop()
    assert given == [(JOBS, False), (2 * JOBS, False)]
    told.clear()
    monkeypatch.setattr(turns, "IDLE", 0.05)
    worker.run(lambda: done.append(None))
    assert told.wait(30) and given[2:] == [(2 * JOBS + 4, True)]
    time.sleep(0.3)
    assert len(given) == 3  # once, and not again
    worker.stop()


def test_nothing_of_a_job_is_kept():
    import gc
    import weakref

    class Thing:
        pass

    worker, thing = Worker("test"), Thing()
    gone = weakref.ref(thing)
    worker.run(lambda thing=thing: None, thing, 0)
    del thing
    worker.run(lambda: None)
    gc.collect()
    assert gone() is None
    worker.stop()


@pytest.mark.parametrize(
    ("given", "before", "spins"),
    [
        ({}, "", "1000"),
        ({"GOMP_SPINCOUNT": "77"}, "", "77"),
        ({"OMP_WAIT_POLICY": "active"}, "", None),
        ({}, "import torch;", None),
    ],
    ids=["vsuav's", "the user's count", "the user's policy", "loaded before"],
)
def test_threads_that_wait_leave_the_core_to_others_unless_the_user_says_otherwise(given, before, spins):
    """What GNU OpenMP says it uses, once torch has loaded it."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    program = f"{before}import vsuav.networks"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not said:
        pytest.skip("torch uses another OpenMP than GNU's here")
    assert said[0] == spins if spins else said[0] != "1000"
