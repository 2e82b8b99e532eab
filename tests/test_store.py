"""The laws of the store: a dict that forgets the least valuable first, and counts the bytes it really holds."""

import gc
import threading
import weakref
from collections import OrderedDict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vsuav.store import Store

KEYS = st.integers(0, 9)
SHAPES = st.sampled_from([(1,), (4,), (2, 3), (0,), (16,)])


def really_held(store: Store) -> int:
    """Bytes of memory that stay allocated because of the store: of storages, each once."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in entries(store)}
    return sum(storages.values())


def entries(store: Store) -> list[torch.Tensor]:
    return [value for shelf in store._shelves.values() for value in shelf.values()]


class StoreAgainstDict(RuleBasedStateMachine):
    """The store beside a plain model: keys in order of use; the first of the farthest is the next to go."""

    @initialize(budget=st.sampled_from([0, 16, 40, 100, 1000]))
    def start(self, budget):
        self.store = Store(budget)
        self.model: OrderedDict[int, torch.Tensor] = OrderedDict()
        self.budget = budget
        self.serial = 0
        self.distance = dict.fromkeys(range(10), 0)

    def tensor(self, shape):
        self.serial += 1
        return torch.full(shape, float(self.serial))

    def keep(self, key, value):
        self.model.pop(key, None)
        if value.nbytes <= self.budget:
            self.model[key] = value
            while sum(v.nbytes for v in self.model.values()) > self.budget:
                del self.model[max(self.model, key=self.distance.get)]

    @rule(key=KEYS, shape=SHAPES)
    def put(self, key, shape):
        value = self.tensor(shape)
        returned = self.store.put(key, value)
        assert torch.equal(returned, value)
        self.keep(key, value)

    @rule(key=KEYS, length=st.integers(1, 8))
    def put_a_slice(self, key, length):
        whole = self.tensor((8, 4))
        self.store.put(key, whole[:length])
        self.keep(key, whole[:length].clone())

    @rule(key=KEYS)
    def put_a_transposed_one(self, key):
        value = torch.arange(6.0).reshape(2, 3).t() + self.serial
        assert torch.equal(self.store.put(key, value), value)
        self.keep(key, value)

    @rule(key=KEYS)
    def get(self, key):
        value, expected = self.store.get(key), self.model.get(key)
        assert (value is None) == (expected is None)
        if expected is not None:
            assert torch.equal(value, expected)
            self.model.move_to_end(key)

    @rule(distances=st.lists(st.integers(0, 3), min_size=10, max_size=10))
    def rank(self, distances):
        self.distance = dict(enumerate(distances))
        self.store.rank(self.distance.__getitem__)

    @rule(budget=st.sampled_from([0, 50, 200]))
    def raise_budget(self, budget):
        assert self.store.raise_budget(budget) == (budget > self.budget)
        self.budget = max(self.budget, budget)

    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()

    @invariant()
    def holds_what_the_model_holds(self):
        if not hasattr(self, "model"):
            return
        assert len(self.store) == len(self.model)
        for key in range(10):
            assert (key in self.store) == (key in self.model)
        assert self.store.bytes == sum(value.nbytes for value in self.model.values()) == really_held(self.store)
        assert self.store.bytes <= self.store.budget == self.budget


TestStore = StoreAgainstDict.TestCase


def test_a_slice_does_not_pin_its_window():
    store = Store(10**6)
    window = torch.zeros(1000)
    storage = weakref.ref(window)
    store.put("a", window[:10])
    del window
    gc.collect()
    assert storage() is None
    assert store.bytes == 40 == really_held(store)


def test_an_expanded_tensor_is_counted_at_what_it_takes():
    store = Store(10**6)
    store.put("a", torch.zeros(1, 4).expand(100, 4))
    assert store.bytes == really_held(store) == 1600


def test_counters_tell_what_happened():
    store = Store(8)
    store.put("a", torch.zeros(1))
    store.put("b", torch.zeros(2))
    assert store.get("a") is None
    assert store.get("b") is not None
    counters = store.counters
    assert (counters.puts, counters.hits, counters.misses, counters.evictions) == (2, 1, 1, 1)


def test_many_threads_never_lose_count():
    store = Store(4000)
    failures = []

    def work(seed: int):
        generator = torch.Generator().manual_seed(seed)
        try:
            for i in range(400):
                key = int(torch.randint(40, (), generator=generator))
                if i % 3:
                    store.put(key, torch.full((int(torch.randint(1, 60, (), generator=generator)),), float(key)))
                elif (value := store.get(key)) is not None:
                    assert (value == key).all()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.bytes == really_held(store) <= 4000
    assert store.counters.evictions > 0


def test_a_tensor_larger_than_the_budget_passes_through():
    store = Store(10)
    value = torch.zeros(100)
    assert store.put("a", value) is value
    assert "a" not in store
    assert store.bytes == 0


@pytest.mark.parametrize("first", [4, 8])
def test_putting_again_replaces(first):
    store = Store(100)
    store.put("a", torch.zeros(first))
    store.put("a", torch.ones(2))
    assert store.bytes == 8
    assert torch.equal(store.get("a"), torch.ones(2))
