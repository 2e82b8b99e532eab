"""How fast a network is, and how fast it could be: timings in turns, the products it consists of, the roofline.

The products (convolutions and matrix products) are counted on the plain version of a network (scripts/plain.py), so an
implementation that gets by with fewer multiplications is faster, not smaller. The roofline of a network is the time
that its products take if each runs alone, in the best of the ways of `ways`, at the best rate seen on this machine.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vsuav.operators import FUSED_DTYPES

Shape = tuple[int, ...]
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    least: float
    median: float

    def of(self, count: int) -> "Timing":
        """The same of one of `count` pieces."""
        return Timing(self.least / count, self.median / count)


def seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def race(calls: Mapping[str, Call], repeat: int, budget: float, least: int = 2) -> dict[str, Timing]:
    """Times of the calls, made in turns: `repeat` rounds, fewer (but `least`) once `budget` seconds are spent.

    If there is more than `least`, the first round only warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for done in range(1, repeat + 2):
        for name, call in calls.items():
            times[name].append(seconds(call))
        if done >= least and time.perf_counter() - began > budget:
            break
    warm = int(done > least)
    return {name: Timing(min(taken[warm:]), median(taken[warm:])) for name, taken in times.items()}


@dataclass(frozen=True)
class Product:
    """A convolution, a matrix product "m k" x "k n", or a batch of them "b m k" x "b k n", by its shapes."""

    left: Shape
    right: Shape
    stride: Shape = ()
    padding: Shape = ()

    @property
    def kind(self) -> str:
        return "convolution" if self.stride else "product" if len(self.left) == 2 else "batched product"

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and its addition being two."""
        if not self.stride:
            return 2 * prod(self.left) * self.right[-1]
        sides = zip(self.left[2:], self.right[2:], self.stride, self.padding, strict=True)
        pixels = prod((side + 2 * pad - k) // step + 1 for side, k, step, pad in sides)
        return 2 * self.left[0] * pixels * prod(self.right)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Normal noise of the right shapes; the right one about as small as weights are."""
        size = prod(self.right[1:]) if self.stride else self.left[-1]
        return torch.randn(self.left).to(dtype), (torch.randn(self.right) / size**0.5).to(dtype)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        match func.overloadpacket.__name__:
            case "convolution":
                self.add(args[0], args[1], tuple(args[3]), tuple(args[4]))
            case "mm" | "bmm":
                self.add(args[0], args[1])
            case "addmm" | "baddbmm":
                self.add(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def add(self, left: Tensor, right: Tensor, *how: Shape) -> None:
        self.products[Product(tuple(left.shape), tuple(right.shape), *how)] += 1


def products(call: Call) -> Counter[Product]:
    """The products that `call` computes, and how often. On meta tensors this takes no time."""
    with _Recorder() as recorder, torch.no_grad():
        call()
    return recorder.products


def ways(product: Product, left: Tensor, right: Tensor) -> Iterator[tuple[str, Call]]:
    """The ways of computing a product, each in the memory it likes best; all give the same.

    Convolutions in both memory layouts, one over time also as a 2-D one over (time, pixels), one over three frames also
    as a 2-D one of all their channels, one of single pixels also as a matrix product; matrix products with the right
    matrix in both orders, and by oneDNN's linear layer.
    """
    if product.kind == "batched product":
        turned = right.transpose(1, 2).contiguous().transpose(1, 2)
        yield "rows", partial(torch.bmm, left, right)
        yield "columns", partial(torch.bmm, left, turned)
    elif product.kind == "product":
        turned = right.t().contiguous()
        yield "rows", partial(torch.mm, left, right)
        yield "columns", partial(torch.mm, left, turned.t())
        if left.dtype in FUSED_DTYPES:
            linear = torch.ops.mkldnn._linear_pointwise
            yield "oneDNN", lambda: linear(left, turned, None, "none", [], "")
    else:
        convolve = F.conv3d if left.ndim == 5 else F.conv2d
        last = torch.channels_last_3d if left.ndim == 5 else torch.channels_last
        near = [x.contiguous(memory_format=last) for x in (left, right)]
        for name, (x, weight) in (("default", (left, right)), ("channels-last", near)):
            yield name, partial(convolve, x, weight, None, product.stride, product.padding)
        if left.ndim == 5 and product.right[3:] == (1, 1):
            for name, layout in (("default", torch.contiguous_format), ("channels-last", torch.channels_last)):
                x, weight = (y.contiguous(memory_format=layout) for y in (left.flatten(3), right[..., 0]))
                planar = partial(F.conv2d, x, weight, None, product.stride[:2], product.padding[:2])
                yield f"2-D {name}", lambda planar=planar: planar().unflatten(3, product.left[3:])
        if left.ndim == 5 and product.right[2:] == (3, 3, 3) and (*product.stride, *product.padding) == (1,) * 6:
            b, _, t, h, w = left.shape
            neighbours = F.pad(left, (0, 0, 0, 0, 1, 1)).unfold(2, 3, 1).permute(0, 2, 5, 1, 3, 4)
            x = neighbours.reshape(b * t, -1, h, w).contiguous(memory_format=torch.channels_last)
            weight = right.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
            yield "2-D of three frames", lambda: F.conv2d(x, weight, padding=1).unflatten(0, (b, t)).movedim(2, 1)
        if prod(product.right[2:]) == prod(product.stride) == 1:
            pixels = left.movedim(1, -1).flatten(0, -2).contiguous()
            out = (product.left[0], *product.left[2:], product.right[0])
            flat = Product(tuple(pixels.shape), (product.right[1], product.right[0]))
            for name, multiply in ways(flat, pixels, right.flatten(1).t().contiguous()):
                yield f"product, {name}", lambda multiply=multiply: multiply().view(out).movedim(-1, 1)


class Roofline:
    """The least time of products, measured once each."""

    def __init__(self, effort: float):
        """effort: seconds to spend on repetitions of one way of computing a product."""
        self._effort = effort
        self._best: dict[tuple[Product, torch.dtype], tuple[float, str]] = {}

    def best(self, product: Product, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds of the fastest way, and its name."""
        key = product, dtype
        if key not in self._best:
            self._best[key] = min((self._time(way), name) for name, way in ways(product, *product.operands(dtype)))
        return self._best[key]

    def _time(self, way: Call) -> float:
        way()
        least, spent, done = float("inf"), 0.0, 0
        while done < 2 or (spent < self._effort and done < 100):
            taken = seconds(way)
            least, spent, done = min(least, taken), spent + taken, done + 1
        return least

    def seconds(self, counted: Counter[Product], dtype: torch.dtype) -> float:
        """Seconds of all the products of a network."""
        return sum(count * self.best(product, dtype)[0] for product, count in counted.items())

    def list(self, counted: Counter[Product]) -> list[dict]:
        """The products of a network with their rates, the most expensive first."""
        rows = []
        for product, count in sorted(counted.items(), key=lambda item: -item[1] * item[0].flops):
            row = {"kind": product.kind, "left": product.left, "right": product.right, "stride": product.stride,
                   "count": count, "gflop": product.flops / 1e9}  # fmt: skip
            for (known, dtype), (least, way) in self._best.items():
                if known == product:
                    row[str(dtype).removeprefix("torch.")] = {"gflops": product.flops / least / 1e9, "way": way}
            rows.append(row)
        return rows


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still held."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._parameters: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for tensor in tree_leaves((args, made)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if isinstance(tensor, nn.Parameter):
                    self._parameters.add(storage._cdata)
                if storage._cdata not in self._parameters:
                    self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return made


class _FlatAttention(TorchFunctionMode):
    """Attention as a GPU computes it: without a matrix of scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def largest(call: Call) -> int:
    """Most bytes that activations (inputs included, parameters not) take at one time during `call`.

    Meant for meta tensors: no memory is needed to find out.
    """
    with torch.no_grad(), _FlatAttention(), _Live() as live:
        call()
    return live.peak
