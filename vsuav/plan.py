"""Which tasks make a block of frames, and which input frames they read. Pure: no torch, no I/O, nothing is run.

The value of a frame is the root of a finite graph. `latent(step, n)` is read by the windows of `step` that contain n;
their merged predictions give `latent(step + 1, n)`; a propagation step puts a backward and a forward chain of links in
between. A key names one value of the graph:

    ("v", step, start, stop)      prediction of one window    ("latent", step, n)   latent of frame n before `step`
    ("deep", step, start, stop)   deep features of a window   ("frame", n)          decoded frame
    ("x0", step, n)               clean latent as predicted   ("motion", n)         flow between n and n + 1, both ways
    ("back", step, n)             backward value of frame n   ("flow", n)           where it says pixels come from
    ("clean", step, n)            clean latent as used

Latents before step 0 are noise and need no task. The planner goes through the steps from the last to the first,
collects what is wanted and not there, and lists the tasks so that each is done when a later one needs it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from vsuav.propagation import backward_start, forward_start
from vsuav.shots import FORCED, REACH, Shots
from vsuav.tiling import BLOCK, STRIDE, WINDOW, Span, chunk_of, windows_of

Key = tuple


@dataclass(frozen=True)
class Recipe:
    """What the planner knows of the settings: steps, how many earlier x0 the solver reads, propagation, reuse, degrain.

    A window of a step in `reuse` reads the deep features of the same window at `origin(step)`, the last step before
    that is computed in full. It reads latents of the same frames, which depend on all that these features depend on,
    so no cone grows.
    """

    steps: int
    history: int = 0
    propagation: frozenset[int] = frozenset()
    radius: int = 16
    reuse: frozenset[int] = frozenset()
    degrain: bool = False

    def origin(self, step: int) -> int:
        """The step whose deep features the windows of `step` are computed with: its own, or an earlier one."""
        while step in self.reuse:
            step -= 1
        return step

    def keeps(self, step: int) -> bool:
        """Whether the deep features of `step` are read by later steps."""
        return step not in self.reuse and step + 1 in self.reuse

    @property
    def reach(self) -> int:
        """No block's value depends on input frames farther away from it than this: its widest cone, cuts included.

        A step widens the cone by 6 frames, a propagation step by R + 6 in addition; 3 more where a shot's first chunk
        looks over the end of the block and its last window is moved.
        """
        return STRIDE * self.steps + 3 + len(self.propagation) * (self.radius + STRIDE)


class Task(NamedTuple):
    """One piece of work. `reads` and `makes` are keys, `sources` the input frames it reads.

    Kinds: ``window`` (one U-Net call), ``flow``, ``x0``, ``backward``, ``forward``, ``step``, ``decode``.
    `frames` are the frames it is about in rising order; a chain runs over all of them.
    """

    kind: str
    step: int
    frames: tuple[int, ...]
    reads: tuple[Key, ...]
    makes: tuple[Key, ...]
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Tasks in an order in which everything a task reads is made before it or was there."""

    tasks: tuple[Task, ...]

    @property
    def sources(self) -> frozenset[int]:
        """The input frames the tasks read."""
        return frozenset(n for task in self.tasks for n in task.sources)

    @property
    def calls(self) -> int:
        """U-Net window calls."""
        return sum(task.kind == "window" for task in self.tasks)


def evidence_span(first: int, last: int, recipe: Recipe, frames: int, forced: bool) -> range:
    """The frames whose evidence can matter for the frames `first` … `last`.

    The shots of frames inside the widest cone are asked for, but for those that only the first step's windows bring in,
    7 frames on each side. So this reaches 5 frames farther than the cone (17 where cuts are forced).
    """
    reach = recipe.reach - (WINDOW - 1) + REACH + (FORCED if forced else 0)
    return range(max(0, first - reach), min(frames, last + reach + 1))


def plan_block(block: int, recipe: Recipe, shots: Shots, have: Callable[[Key], bool]) -> Plan:
    """The tasks that make the decoded frames of `block`, given what is there.

    Args:
        have: whether the value of a key is there; asked at most once a key.
    """
    chunks = []
    for n in range(block * BLOCK, min((block + 1) * BLOCK, shots.frames)):
        chunk = chunk_of(n, *shots.shot(n))
        if not chunks or chunks[-1] != chunk:
            chunks.append(chunk)
    wanted = {n for chunk in chunks for n in range(chunk.start, chunk.stop)}
    decodes = []
    pairs: set[int] = set()
    for chunk in chunks:
        span = tuple(range(chunk.start, chunk.stop))
        seen = _beside(chunk.start, chunk.stop, shots) if recipe.degrain else span
        moving = seen[:-1] if recipe.degrain else ()
        pairs.update(moving)
        reads = (*(("latent", recipe.steps, n) for n in span), *(("motion", n) for n in moving))
        makes = tuple(("frame", n) for n in range(chunk.start, chunk.keep))
        decodes.append(Task("decode", recipe.steps, span, reads, makes, seen))
    motions = {n for n in pairs if not have(("motion", n))}
    return Plan((*plan_latents(wanted, recipe, shots, have, motions).tasks, *decodes))


def _beside(start: int, stop: int, shots: Shots) -> tuple[int, ...]:
    """The frames of ``[start, stop)`` and those right before and after that are of the same shot."""
    return tuple(range(shots.clamp(start, start - 1), shots.clamp(stop - 1, stop) + 1))


def plan_latents(
    wanted: Iterable[int], recipe: Recipe, shots: Shots, have: Callable[[Key], bool], motions: Collection[int] = ()
) -> Plan:
    """The tasks that make the final latents of the frames `wanted`, and the flow from each of `motions`."""
    levels = []
    latents = set(wanted)
    cleans: dict[int, set[int]] = defaultdict(set)
    deeps: dict[int, set[Span]] = defaultdict(set)
    flows: set[int] = set()
    for step in reversed(range(recipe.steps)):
        level = _Level(step, recipe, shots, have)
        latents = level.demand(latents, cleans, deeps, flows)
        levels.append(level.tasks)
    flow_tasks = []
    for n in sorted(flows.union(motions)):
        moving = n in motions or recipe.degrain  # a later block will decode with it: it is not to be estimated again
        makes = tuple((kind, n) for kind, made in (("flow", n in flows), ("motion", moving)) if made)
        flow_tasks.append(Task("flow", 0, (n, n + 1), (), makes, (n, n + 1)))
    return Plan(tuple(_late([*flow_tasks, *(task for level in reversed(levels) for task in level)])))


def _late(tasks: list[Task]) -> Iterator[Task]:
    """The tasks, each only when a later one reads what it makes: so that as little as possible is held at one time."""
    maker = {key: task for task in tasks for key in task.makes}
    read = {key for task in tasks for key in task.reads}
    roots = [task for task in tasks if read.isdisjoint(task.makes)]
    begun: set[Key] = set()
    stack = [(task, iter(task.reads)) for task in reversed(roots)]
    while stack:
        task, reads = stack[-1]
        begun.add(task.makes[0])
        for key in reads:
            if key in maker and maker[key].makes[0] not in begun:
                stack.append((maker[key], iter(maker[key].reads)))
                break
        else:
            stack.pop()
            yield task


class _Level:
    """The tasks of one step."""

    def __init__(self, step: int, recipe: Recipe, shots: Shots, have: Callable[[Key], bool]):
        self.step, self.recipe, self.shots, self.have = step, recipe, shots, have
        self.tasks: list[Task] = []
        self._spans: dict[int, list[Span]] = {}

    def demand(
        self, latents: set[int], cleans: dict[int, set[int]], deeps: dict[int, set[Span]], flows: set[int]
    ) -> set[int]:
        """Plan this step for the frames whose next latent is wanted; return those whose latent it reads.

        `cleans` maps steps to the frames whose clean latent a later step reads, `deeps` to the windows whose deep
        features one reads; `flows` collects flow pairs.
        """
        step, recipe = self.step, self.recipe
        stepping = {n for n in latents if not self.have(("latent", step + 1, n))}
        cleaning = {n for n in cleans.pop(step, ()) if not self.have(("clean", step, n))}
        chains: list[Task] = []
        raw: set[int] = set()
        if step in recipe.propagation:
            cleaning |= {n for n in stepping - cleaning if not self.have(("clean", step, n))}
            chains, raw = self._chains(cleaning, flows)
        else:
            stepping |= cleaning
        for earlier in range(max(0, step - recipe.history), step):
            cleans[earlier] |= stepping
        windows = self._windows(stepping | raw, deeps)
        self.tasks += windows
        self.tasks += [Task("x0", step, (n,), self._prediction(n), (("x0", step, n),)) for n in sorted(raw)]
        self.tasks += chains
        self.tasks += [self._step(n) for n in sorted(stepping)]
        return stepping | raw | {n for task in windows for n in task.frames}

    def _spans_of(self, n: int) -> list[Span]:
        if n not in self._spans:
            self._spans[n] = windows_of(n, *self.shots.shot(n))
        return self._spans[n]

    def _windows(self, frames: set[int], deeps: dict[int, set[Span]]) -> list[Task]:
        step, origin = self.step, self.recipe.origin(self.step)
        again = {span for span in deeps.pop(step, ()) if not self.have(("deep", step, *span))}
        tasks = []
        for span in sorted(again.union(span for n in frames for span in self._spans_of(n))):
            makes: tuple[Key, ...] = (("v", step, *span),)
            if span not in again and self.have(makes[0]):
                continue
            inside = tuple(range(*span))
            reads = self._latents(inside)
            if origin < step:
                reads += (("deep", origin, *span),)
                deeps[origin].add(span)
            elif self.recipe.keeps(step):
                makes += (("deep", step, *span),)
            tasks.append(Task("window", step, inside, reads, makes, inside))
        return tasks

    def _latents(self, frames: Iterable[int]) -> tuple[Key, ...]:
        return tuple(("latent", self.step, n) for n in frames) if self.step else ()

    def _prediction(self, n: int) -> tuple[Key, ...]:
        """What a prediction of frame n reads: its latent, then its windows in the order of the merge."""
        return (*self._latents((n,)), *(("v", self.step, *span) for span in self._spans_of(n)))

    def _step(self, n: int) -> Task:
        step, recipe = self.step, self.recipe
        reads = self._prediction(n)
        makes: tuple[Key, ...] = (("latent", step + 1, n),)
        if step in recipe.propagation:
            reads += (("clean", step, n),)
        elif recipe.history and step + 1 < recipe.steps:
            makes += (("clean", step, n),)
        reads += tuple(("clean", earlier, n) for earlier in range(step - 1, max(-1, step - 1 - recipe.history), -1))
        return Task("step", step, (n,), reads, makes)

    def _chains(self, cleaning: set[int], flows: set[int]) -> tuple[list[Task], set[int]]:
        """Forward chains that make the clean latents of `cleaning`, and the backward chains they read."""
        step = self.step
        ends: dict[int, int] = {}
        for n in cleaning:
            start = _forward_start(n, self.recipe, self.shots)
            ends[start] = max(n, ends.get(start, n))
        backs = {n for start, end in ends.items() for n in range(start, end + 1)}
        backs = {n for n in backs if not self.have(("back", step, n))}
        starts: dict[int, int] = {}
        for n in backs:
            last = _backward_start(n, self.recipe, self.shots)
            starts[last] = min(n, starts.get(last, n))
        tasks = [self._chain("backward", first, last, backs) for last, first in sorted(starts.items())]
        tasks += [self._chain("forward", first, last, cleaning) for first, last in sorted(ends.items())]
        raw = {n for task in tasks if task.kind == "backward" for n in task.frames}
        links = {n for task in tasks for n in task.frames[:-1]}
        flows |= {n for n in links - flows if not self.have(("flow", n))}
        return tasks, {n for n in raw if not self.have(("x0", step, n))}

    def _chain(self, kind: str, first: int, last: int, wanted: set[int]) -> Task:
        """One chain over the frames `first` … `last`; it makes those of `wanted` that share its starting point."""
        frames = tuple(range(first, last + 1))
        if kind == "backward":
            reads, makes = "x0", "back"
            mine = [n for n in frames if n in wanted and _backward_start(n, self.recipe, self.shots) == last]
        else:
            reads, makes = "back", "clean"
            mine = [n for n in frames if n in wanted and _forward_start(n, self.recipe, self.shots) == first]
        keys = (*((reads, self.step, n) for n in frames), *(("flow", n) for n in frames[:-1]))
        return Task(kind, self.step, frames, keys, tuple((makes, self.step, n) for n in mine))


def _backward_start(n: int, recipe: Recipe, shots: Shots) -> int:
    """Where the backward chain of frame n starts, from the cuts on the way only."""
    return backward_start(n, recipe.radius, shots.clamp(n, n + recipe.radius + STRIDE - 1) + 1)


def _forward_start(n: int, recipe: Recipe, shots: Shots) -> int:
    """Where the forward chain of frame n starts."""
    return forward_start(n, recipe.radius, shots.clamp(n, n - recipe.radius - STRIDE + 1))


def cone(frame: int, recipe: Recipe, shots: Shots) -> tuple[int, int]:
    """``(first, last)`` input frame that the final latent of `frame` depends on."""
    first = last = frame
    for step in reversed(range(recipe.steps)):
        if step in recipe.propagation:
            first, last = _forward_start(first, recipe, shots), _backward_start(last, recipe, shots)
        first = min(start for start, _ in windows_of(first, *shots.shot(first)))
        last = max(stop for _, stop in windows_of(last, *shots.shot(last))) - 1
    return first, last


FAR = 16
"""Distance of what a linear pass at the present place will not read."""
NOWHERE = (10**9, -(10**9))
FINAL = 9
"""Final latents are at most this far: they answer a seek back without a call."""


@dataclass(frozen=True)
class Front:
    """What a linear pass carries from one block to the next.

    `final` is the kind of the final latents; `spans` gives, for the kinds of keys that are still read, from where to
    where they lie, in frames from the first frame of the next block; `frames` how many frames' worth of each there are.
    """

    final: Key
    spans: dict[Key, tuple[int, int]]
    frames: Counter[str]

    def distance(self, key: Key, block: int) -> int:
        """How many frames `key` lies outside the front after `block`: 0 means that the next blocks read it."""
        place = key[-1] - (block + 1) * BLOCK
        low, high = self.spans.get(_kind(key), NOWHERE)
        farthest = FINAL if key[:2] == self.final else FAR
        return min(farthest, max(low - place, place - high, 0))


def _kind(key: Key) -> Key:
    return key[:1] if key[0] in ("flow", "motion") else key[:2]


@lru_cache(maxsize=16)
def front(recipe: Recipe) -> Front:
    """The front of a linear pass, found by planning one through a long shot."""
    lead = -(-recipe.reach // BLOCK) + 2
    shots = Shots((lead + 2) * BLOCK + 2 * recipe.reach)
    made: dict[Key, int] = {}
    spans: dict[Key, tuple[int, int]] = {}

    def have(key: Key) -> bool:
        if key not in made:
            return False
        if block >= lead and made[key] < block:
            read, kept = key[-1] - block * BLOCK, key[-1] - (made[key] + 1) * BLOCK
            low, high = spans.get(_kind(key), (read, kept))
            spans[_kind(key)] = min(low, read), max(high, kept)
        return True

    for block in range(lead + 2):
        for task in plan_block(block, recipe, shots, have).tasks:
            for key in task.makes:
                made.setdefault(key, block)
    result = Front(("latent", recipe.steps), spans, Counter())
    for key in made:
        if result.distance(key, block) == 0:
            result.frames[key[0]] += key[3] - key[2] if key[0] in ("v", "deep") else 1
    return result


def working_set(recipe: Recipe, latent_bytes: int, clean_bytes: int, flow_bytes: int, deep_bytes: int = 0) -> int:
    """Bytes a store must hold so that a linear pass computes hardly anything twice, cuts included.

    Args:
        latent_bytes: of one latent of one frame, and of a frame's part of a prediction.
        clean_bytes: of one clean latent, raw or propagated.
        flow_bytes: of one flow pair, and of the origins it leads to.
        deep_bytes: of a frame's part of a window's deep features.
    """
    each = {"v": latent_bytes, "latent": latent_bytes, "flow": flow_bytes, "motion": flow_bytes, "deep": deep_bytes}
    held = sum(each.get(kind, clean_bytes) * count for kind, count in front(recipe).frames.items())
    return held + held // 4 + 2 * WINDOW * (latent_bytes + (deep_bytes if recipe.reuse else 0))
