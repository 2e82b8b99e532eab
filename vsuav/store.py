"""A byte-budgeted store of latents: the least valuable out first, among equals the least recently used.

The store may forget anything at any time; it changes how long a frame takes, never its pixels. Bytes are counted on
what is held: a tensor that is a view of a larger one is copied when it comes in, so it pins nothing else.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Counters:
    """What happened in a store since it was made."""

    hits: int = 0
    misses: int = 0
    puts: int = 0
    evictions: int = 0


class Store:
    """A mapping of keys to tensors that holds at most `budget` bytes. Safe to use from many threads.

    Args:
        budget: bytes, >= 0. A tensor larger than the budget is not kept.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.counters = Counters()
        self._distance: Callable[[Hashable], int] = lambda key: 0
        self._shelves: dict[int, OrderedDict[Hashable, Tensor]] = {}  # distance: what lies there, in order of use
        self._places: dict[Hashable, int] = {}  # key: its shelf, in order of use
        self._bytes = 0
        self._lock = threading.Lock()

    def rank(self, distance: Callable[[Hashable], int]) -> None:
        """From now on forget the keys of the largest `distance` first."""
        with self._lock:
            held = {key: self._shelves[place][key] for key, place in self._places.items()}
            self._empty()
            self._distance = distance
            for key, value in held.items():
                self._shelve(key, value)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of `key`, which becomes the most recently used, or None."""
        with self._lock:
            if key not in self._places:
                self.counters.misses += 1
                return None
            self.counters.hits += 1
            value = self._take(key)
            self._shelve(key, value)
            return value

    def put(self, key: Hashable, value: Tensor) -> Tensor:
        """Keep `value` under `key` and return the tensor to go on with (a copy if `value` was a view)."""
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        with self._lock:
            self.counters.puts += 1
            if key in self._places:
                self._take(key)
            if value.nbytes <= self.budget:
                self._shelve(key, value)
                self._shrink()
        return value

    def raise_budget(self, budget: int) -> bool:
        """Raise the budget to at least `budget` bytes; True if it was lower."""
        with self._lock:
            lower = self.budget < budget
            self.budget = max(self.budget, budget)
            return lower

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._empty()

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        """Whether `key` is held; does not count as a use."""
        return key in self._places

    def _empty(self) -> None:
        self._shelves.clear()
        self._places.clear()
        self._bytes = 0

    def _shelve(self, key: Hashable, value: Tensor) -> None:
        place = self._places[key] = self._distance(key)
        self._shelves.setdefault(place, OrderedDict())[key] = value
        self._bytes += value.nbytes

    def _take(self, key: Hashable) -> Tensor:
        place = self._places.pop(key)
        value = self._shelves[place].pop(key)
        if not self._shelves[place]:
            del self._shelves[place]
        self._bytes -= value.nbytes
        return value

    def _shrink(self) -> None:
        while self._bytes > self.budget:
            self._take(next(iter(self._shelves[max(self._shelves)])))
            self.counters.evictions += 1
