"""A byte-budgeted store of latents: least recently used out first.

The store may forget anything at any time; it changes how long a frame takes, never its pixels. Bytes are counted on
what is held: a tensor that is a view of a larger one is copied when it comes in, so it pins nothing else.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
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
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of `key`, which becomes the most recently used, or None."""
        with self._lock:
            value = self._entries.get(key)
            if value is None:
                self.counters.misses += 1
            else:
                self.counters.hits += 1
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Tensor) -> Tensor:
        """Keep `value` under `key` and return the tensor to go on with (a copy if `value` was a view)."""
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        with self._lock:
            self._drop(key)
            self.counters.puts += 1
            if value.nbytes <= self.budget:
                self._entries[key] = value
                self._bytes += value.nbytes
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
            self._entries.clear()
            self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        """Whether `key` is held; does not count as a use."""
        return key in self._entries

    def _drop(self, key: Hashable) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self._bytes -= old.nbytes

    def _shrink(self) -> None:
        while self._bytes > self.budget:
            _, old = self._entries.popitem(last=False)
            self._bytes -= old.nbytes
            self.counters.evictions += 1
