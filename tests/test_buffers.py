"""Memory that is used again: never while anybody can still see it, and not for ever."""

import gc
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vsuav import buffers
from vsuav.layers import concat

NUMBERS = buffers.LARGE // 4


@pytest.fixture(autouse=True)
def nothing_spare():
    buffers.let_go()
    yield
    buffers.let_go()


@given(st.lists(st.tuples(st.sampled_from([NUMBERS, NUMBERS + 4, 2 * NUMBERS]), st.integers(0, 3)), max_size=30))
def test_nobody_sees_another_ones_numbers(steps):
    """Tensors come and go, some leave only a view behind; each is filled with its own number."""
    held = []
    for i, (numbers, drop) in enumerate(steps):
        fresh = buffers.empty((numbers // 4, 4), torch.float32).fill_(i)
        assert fresh.is_contiguous() and fresh.data_ptr() % buffers.ALIGNED == 0
        held.append((i, fresh if i % 2 else fresh[1::3].T))
        del fresh
        if drop and len(held) > 1:
            held.pop(drop % len(held))
        assert all((tensor == number).all() for number, tensor in held)


def test_the_same_memory_comes_back_once_its_last_view_is_gone():
    first = buffers.empty((2, NUMBERS), torch.float32)
    place, view = first.data_ptr(), first[1, 5:].view(torch.int32)
    del first
    assert buffers.empty((2, NUMBERS), torch.float32).data_ptr() != place
    buffers.let_go()
    del view
    again = buffers.empty((2, NUMBERS), torch.float32)
    place = again.data_ptr()
    del again
    assert buffers.empty((NUMBERS, 4), torch.bfloat16).data_ptr() == place  # of another type, as many bytes


def test_small_ones_are_torchs_own():
    small = buffers.empty((3, 5), torch.bfloat16)
    assert small.shape == (3, 5) and small.dtype == torch.bfloat16
    del small
    assert not any(buffers._spare.values())


def test_what_is_let_go_leaves_the_living_alone():
    held, gone = (buffers.empty((NUMBERS,), torch.float32).fill_(i) for i in range(2))
    del gone
    gc.collect()
    assert sum(map(len, buffers._spare.values())) == 1
    buffers.let_go()
    assert not buffers._spare and (held == 0).all()
    del held
    assert not buffers._spare


def test_sizes_that_are_no_longer_asked_for_are_freed():
    buffers.tidy()
    one, two = (buffers.empty((numbers,), torch.float32) for numbers in (NUMBERS, 2 * NUMBERS))
    del one, two
    buffers.tidy()
    assert {size: len(rooms) for size, rooms in buffers._spare.items()} == {4 * NUMBERS: 1, 8 * NUMBERS: 1}
    buffers.empty((NUMBERS,), torch.float32)
    buffers.tidy()
    assert {size: len(rooms) for size, rooms in buffers._spare.items()} == {4 * NUMBERS: 1}


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.booleans()), max_size=30))
def test_what_is_kept_is_bounded_and_asked_for_last(steps):
    most, held, asked = 4, [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "MOST", most * 4 * NUMBERS)
        buffers.let_go()
        buffers.tidy()
        for size, drop in steps:
            held.append(buffers.empty((size * NUMBERS,), torch.float32))
            asked.append(size)
            if drop:
                held.clear()
            kept = {size // (4 * NUMBERS): len(rooms) for size, rooms in buffers._spare.items() if rooms}
            assert sum(size * count for size, count in kept.items()) <= most
            if drop:
                assert asked[-1] in kept


def test_what_was_asked_for_longest_ago_goes_first(monkeypatch):
    monkeypatch.setattr(buffers, "MOST", 3 * 4 * NUMBERS)
    held = [buffers.empty((numbers,), torch.float32) for numbers in (NUMBERS, 2 * NUMBERS, NUMBERS)]
    del held[0], held[0], held[0]
    assert {size: len(rooms) for size, rooms in buffers._spare.items()} == {4 * NUMBERS: 2, 8 * NUMBERS: 0}


def test_threads_do_not_share():
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = buffers.empty((NUMBERS,), torch.float32).fill_(number)
            if not (mine == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_concatenation_in_inference_is_that_of_training(dtype):
    a, b = (torch.randn(1, c, 3, 64, 80).to(dtype, memory_format=torch.channels_last_3d) for c in (24, 8))
    expected = torch.cat([a, b], dim=1)
    with torch.no_grad():
        assert torch.equal(concat(a, b), expected)
    assert torch.equal(concat(a.requires_grad_(), b), expected) and concat(a, b).requires_grad
