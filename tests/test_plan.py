"""The planner against a naive loop over whole shots.

Values are symbols: the hash of what they are made of. A plan is carried out on symbols and must end in the symbols of
the naive loop, whatever part of them was there before; so windows, merge order, chains and chunks are the same.
"""

import random
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vsuav.plan import Plan, Recipe, Task, cone, evidence_span, front, plan_block, plan_latents, working_set
from vsuav.shots import FORCED, Record, Shots
from vsuav.store import Store
from vsuav.tiling import BLOCK


def half(merged: int, value: int) -> int:
    return merged if merged == value else hash(("half", merged, value))


class Naive:
    """Every value of a clip as a symbol, made shot by shot and step by step, as the reference program does it."""

    def __init__(self, length: int, cuts: list[int], recipe: Recipe):
        self.recipe, self.values, self.leaves = recipe, {}, {}
        self.visits = 0
        for n in range(length - 1):
            for kind in ("flow", "motion"):
                self._make((kind, n), (kind, n), frames=(n, n + 1))
        ends = [0, *cuts, length]
        for start, stop in zip(ends, ends[1:], strict=False):
            self._shot(start, stop)

    def _make(self, key, content, reads=(), frames=()):
        self.values[key] = hash(content)
        self.leaves[key] = frozenset(frames).union(*(self.leaves[read] for read in reads))

    def _shot(self, a: int, b: int) -> None:
        recipe, values = self.recipe, self.values
        shot = range(a, b)
        for n in shot:
            self._make(("latent", 0, n), ("noise", n))
        grid = [a] if b - a <= 8 else [min(max(6 * i, a), b - 8) for i in range(a // 6, (b - 1) // 6 + 1)]
        for step in range(recipe.steps):
            merged, seen = {}, {n: [("latent", step, n)] for n in shot}
            for first in grid:
                last = min(first + 8, b)
                key, reads = ("v", step, first, last), [("latent", step, n) for n in range(first, last)]
                if step + 1 in recipe.reuse:
                    deep = "deep", *key[1:]
                    self._make(deep, (*deep, *(values[read] for read in reads)), reads, range(first, last))
                earlier = [] if step not in recipe.reuse else reads_of_origin(step, recipe, first, last)
                reads += earlier
                self._make(key, (*key, *(values[read] for read in reads)), reads, range(first, last))
                self.visits += 1
                for n in range(first, last):
                    value = hash(("at", values[key], n))
                    merged[n] = half(merged[n], value) if n in merged else value
                    seen[n].append(key)
            for n in shot:
                self._make(("x0", step, n), ("x0", step, values["latent", step, n], merged[n]), seen[n])
            self._clean(step, a, b)
            for n in shot:
                earlier = [("clean", step - j, n) for j in range(1, recipe.history + 1) if step >= j]
                reads = [*seen[n], ("clean", step, n), *earlier]
                content = (values["latent", step, n], merged[n], *(values[key] for key in reads[len(seen[n]) :]))
                self._make(("latent", step + 1, n), ("next", step, *content), reads)
        for n in shot:
            first = max(n // 3 * 3, a)
            span = range(first, min(first + 3, b))
            reads = [("latent", recipe.steps, m) for m in span]
            if recipe.degrain:
                reads += [("motion", m) for m in range(max(a, span[0] - 1), min(b - 1, span[-1] + 1))]
            self._make(("frame", n), ("frame", n, *(values[read] for read in reads)), reads)

    def _clean(self, step: int, a: int, b: int) -> None:
        radius, values = self.recipe.radius, self.values
        if step not in self.recipe.propagation:
            for n in range(a, b):
                self.values["clean", step, n] = values["x0", step, n]
                self.leaves["clean", step, n] = self.leaves["x0", step, n]
            return
        for kind, source in (("back", "x0"), ("clean", "back")):
            for m in range(a, b):
                if kind == "back":
                    start, way = min(b - 1, -(-(m + radius) // 6) * 6), -1
                else:
                    start, way = max(a, (m - radius) // 6 * 6), 1
                value = values[source, step, start]
                reads = [(source, step, start)]
                for i in range(start + way, m + way, way):
                    flow = ("flow", min(i, i - way))
                    value = hash(("link", way, values[source, step, i], value, values[flow]))
                    reads += [(source, step, i), flow]
                self.values[kind, step, m] = value
                self.leaves[kind, step, m] = frozenset().union(*(self.leaves[read] for read in reads))


def reads_of_origin(step: int, recipe: Recipe, first: int, last: int) -> list[tuple]:
    """The deep features of the last step that is not in `reuse`."""
    return [("deep", max(s for s in range(step) if s not in recipe.reuse), first, last)]


def carry_out(task: Task, held: dict, recipe: Recipe) -> list[int]:
    """The symbols a task makes from those of its reads."""
    step = task.step

    def latent(n):
        return held["latent", step, n] if step else hash(("noise", n))

    def prediction(n):
        keys = [key for key in task.reads if key[0] == "v"]
        merged = None
        for key in keys:
            value = hash(("at", held[key], n))
            merged = value if merged is None else half(merged, value)
        return latent(n), merged

    match task.kind:
        case "window":
            latents = [latent(n) for n in task.frames]
            earlier = [held[key] for key in task.reads if key[0] == "deep"]
            return [hash((*key, *latents, *(earlier if key[0] == "v" else ()))) for key in task.makes]
        case "flow":
            return [hash(key) for key in task.makes]
        case "x0":
            return [hash(("x0", step, *prediction(task.frames[0])))]
        case "backward" | "forward":
            source, way = ("x0", -1) if task.kind == "backward" else ("back", 1)
            value, values = None, {}
            for i in task.frames[::way]:
                own = held[source, step, i]
                value = own if value is None else hash(("link", way, own, value, held["flow", min(i, i - way)]))
                values[i] = value
            return [values[key[2]] for key in task.makes]
        case "step":
            n = task.frames[0]
            x, merged = prediction(n)
            clean = held["clean", step, n] if step in recipe.propagation else hash(("x0", step, x, merged))
            earlier = [held[key] for key in task.reads if key[0] == "clean" and key[1] < step]
            following = hash(("next", step, x, merged, clean, *earlier))
            return [following if key[0] == "latent" else clean for key in task.makes]
        case "decode":
            reads = [held[key] for key in task.reads]
            return [hash((*key, *reads)) for key in task.makes]
    raise AssertionError(task.kind)


def run(plan: Plan, held: dict, recipe: Recipe) -> None:
    """Carry out a plan on `held`, holding it to its promises."""
    made = set()
    for task in plan.tasks:
        for key in task.reads:
            assert key in held, f"{task} reads {key} before it is made"
        for key, value in zip(task.makes, carry_out(task, held, recipe), strict=True):
            assert key not in made, f"{key} is made twice"
            made.add(key)
            held[key] = value


NONE: frozenset[int] = frozenset()
RECIPES = st.integers(1, 4).flatmap(
    lambda steps: st.builds(
        Recipe,
        st.just(steps),
        st.integers(0, 2),
        st.frozensets(st.integers(0, steps - 1), max_size=2),
        st.integers(1, 18),
        st.frozensets(st.integers(1, steps - 1)) if steps > 1 else st.just(NONE),
        st.booleans(),
    )
)
CLIPS = st.integers(1, 70).flatmap(
    lambda length: st.tuples(st.just(length), st.sets(st.integers(1, max(1, length - 1)), max_size=5))
).map(lambda clip: (clip[0], sorted(cut for cut in clip[1] if cut < clip[0])))  # fmt: skip


def shots_of(length: int, cuts: list[int], **options) -> Shots:
    return Shots(length, lambda n: Record(cut_before=n in cuts), **options)


def blocks_of(length: int) -> range:
    return range(-(-length // BLOCK))


@settings(max_examples=120, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(CLIPS, RECIPES, st.sampled_from([0, 0.2, 0.9]), st.integers(0, 2**16))
def test_a_plan_makes_what_the_naive_loop_makes(clip, recipe, share, seed):
    """From nothing, and from any part of what could be there."""
    naive = Naive(*clip, recipe)
    shots, generator = shots_of(*clip), random.Random(seed)
    block = generator.choice(blocks_of(clip[0]))
    there = {key: value for key, value in naive.values.items() if generator.random() < share and key[0] != "frame"}
    asked = dict(there)
    plan = plan_block(block, recipe, shots, asked.__contains__)
    held = dict(there)
    run(plan, held, recipe)
    for n in range(block * BLOCK, min((block + 1) * BLOCK, clip[0])):
        assert held["frame", n] == naive.values["frame", n]
    pairs = [task.frames for task in plan.tasks if task.kind == "flow"]
    assert len(pairs) == len(set(pairs))
    windows = [task.makes[0] for task in plan.tasks if task.kind == "window"]
    assert plan.calls == len(windows) == len(set(windows))
    again = set(windows) & there.keys()
    assert all(recipe.keeps(key[1]) and ("deep", *key[1:]) not in there for key in again)
    read = {n for task in plan.tasks if task.kind in ("window", "flow", "decode") for n in task.frames}
    beside = {n + side for task in plan.tasks for kind, n, *_ in task.reads if kind == "motion" for side in (0, 1)}
    assert plan.sources == read | beside


@settings(max_examples=60)
@given(CLIPS, RECIPES)
def test_a_linear_pass_computes_each_window_and_each_flow_once(clip, recipe):
    length, cuts = clip
    naive, shots, held, calls, pairs = Naive(*clip, recipe), shots_of(*clip), {}, [], []
    for block in blocks_of(length):
        plan = plan_block(block, recipe, shots, held.__contains__)
        pairs += [task.frames for task in plan.tasks if task.kind == "flow"]
        calls += [task.makes[0] for task in plan.tasks if task.kind == "window"]
        run(plan, held, recipe)
    assert all(held["frame", n] == naive.values["frame", n] for n in range(length))
    assert len(calls) == len(set(calls))
    assert len(pairs) == len(set(pairs))
    reference = 1 if length <= 8 else len(range(0, length, 6))
    assert len(calls) <= recipe.steps * (reference + 2 * len(cuts))


@settings(max_examples=60)
@given(CLIPS, RECIPES, st.integers(0, 2**16))
def test_what_a_partial_plan_reads_a_fresh_plan_reads(clip, recipe, seed):
    """So a block that reads all sources of the fresh plan can be made whatever the store has lost."""
    naive, shots, generator = Naive(*clip, recipe), shots_of(*clip), random.Random(seed)
    there = {key for key in naive.values if generator.random() < 0.5}
    for block in blocks_of(clip[0]):
        fresh = plan_block(block, recipe, shots, lambda key: False)
        assert plan_block(block, recipe, shots, there.__contains__).sources <= fresh.sources
        assert plan_block(block, recipe, shots, there.__contains__).calls <= fresh.calls


@settings(max_examples=60)
@given(CLIPS, RECIPES)
def test_the_cone_is_what_a_latent_depends_on(clip, recipe):
    naive, shots = Naive(*clip, recipe), shots_of(*clip)
    for n in range(clip[0]):
        first, last = cone(n, recipe, shots)
        assert naive.leaves["latent", recipe.steps, n] == frozenset(range(first, last + 1))
        plan = plan_latents([n], recipe, shots, lambda key: False)
        assert plan.sources == frozenset(range(first, last + 1))


@settings(max_examples=80)
@given(CLIPS, st.sets(st.integers(1, 69), max_size=5), RECIPES)
def test_cone_and_ends_say_everything_about_the_cuts(clip, others, recipe):
    """Two clips whose cuts differ: where cone and its ends agree, so does the latent. Stored latents are keyed so."""
    length, cuts = clip
    others = sorted(cut for cut in others if cut < length)
    results = []
    for made in (cuts, others):
        naive, shots = Naive(length, made, recipe), shots_of(length, made)
        spans = [cone(n, recipe, shots) for n in range(length)]
        keys = [(span, shots.cut(span[0]), shots.cut(span[1] + 1)) for span in spans]
        results.append([(key, naive.values["latent", recipe.steps, n]) for n, key in enumerate(keys)])
    for (key, value), (other_key, other_value) in zip(*results, strict=True):
        if key == other_key:
            assert value == other_value


class Asked(Exception):
    """Evidence was asked for that may not be."""


def planned(block: int, recipe: Recipe, length: int, records: dict[int, Record], allowed: range, **options) -> list:
    """The plan of a block and all that its latents' names on disk are made of, from the evidence of `allowed` only."""

    def record(n):
        if n not in allowed:
            raise Asked(n)
        return records.get(n, Record())

    shots = Shots(length, record, **options)
    plan = plan_block(block, recipe, shots, lambda key: False)
    finals = {key[2] for task in plan.tasks for key in task.reads if key[:2] == ("latent", recipe.steps)}
    spans = [cone(n, recipe, shots) for n in sorted(finals)]
    return [plan, spans, [(shots.cut(first), shots.cut(last + 1)) for first, last in spans]]


@settings(max_examples=100)
@given(
    st.integers(1, 400),
    st.sets(st.integers(1, 400), max_size=60),
    st.booleans(),
    RECIPES,
    st.sampled_from([None, 24]),
    st.data(),
)
def test_evidence_is_read_inside_its_span_only(length, cuts, said, recipe, max_shot, data):
    """Whether cuts come from frame properties or from the detector."""
    block = data.draw(st.sampled_from(blocks_of(length)))
    first, last = block * BLOCK, min((block + 1) * BLOCK, length) - 1
    span = evidence_span(first, last, recipe, length, max_shot is not None)
    records = {n: Record(cut_before=True) if said else Record(0.2 + n % 7 / 10) for n in cuts}
    plan, spans, _ = planned(block, recipe, length, records, span, max_shot=max_shot)
    for low, high in [(min(plan.sources), max(plan.sources)), *spans]:
        assert first - recipe.reach <= low <= high <= last + recipe.reach
    beyond = recipe.reach + 5 + (FORCED if max_shot else 0)
    assert span == range(max(0, first - beyond), min(length, last + beyond + 1))


def test_the_evidence_farthest_away_is_needed():
    """Behind a cut at the end of a block, a cut 10 frames on decides how the last window lies, a flash 4 more hides it.

    So the span of a block's evidence ends where it must.
    """
    block, last, recipe = 20, 125, Recipe(1)
    span = evidence_span(120, last, recipe, 400, False)
    records = {last: Record(0.9), last + 10: Record(0.5)}
    seen = planned(block, recipe, 400, records, span)
    assert max(seen[0].sources) == last + 9 == last + recipe.reach
    assert max(planned(block, recipe, 400, {last: Record(0.9)}, span)[0].sources) == last + 8
    assert span.stop - 1 == last + 14
    assert planned(block, recipe, 400, {**records, last + 14: Record(0.6)}, span) != seen
    with pytest.raises(Asked):
        planned(block, recipe, 400, records, range(span.start, span.stop - 1))


@given(st.integers(1, 300), st.integers(1, 12), st.sampled_from([(), (2,), (1, 3)]))
def test_max_shot_bounds_a_cold_seek(length, steps, propagation):
    recipe = Recipe(steps, 0, frozenset(index for index in propagation if index < steps))
    shots = Shots(length, max_shot=24)
    for block in random.Random(length).sample(blocks_of(length), min(3, len(blocks_of(length)))):
        calls = plan_block(block, recipe, shots, lambda key: False).calls
        assert calls <= steps * 2 * len(range(0, 24 + 13, 6))


COLD_SEEKS = [
    (4, NONE, (20, 16, 16)),
    (4, frozenset({2}), (26, 34, 34)),
    (10, NONE, (68, 100, 100)),
    (30, NONE, (228, 718, 900)),
    (30, frozenset({24, 26, 28}), (234, 880, 1386)),
]
"""Window calls of a cold seek to the middle frame of a shot of 48, 200 and 1000 frames, radius 16."""


@pytest.mark.parametrize(("steps", "propagation", "expected"), COLD_SEEKS)
def test_what_a_cold_seek_costs(steps, propagation, expected):
    recipe = Recipe(steps, 0, propagation)
    for length, calls in zip((48, 200, 1000), expected, strict=True):
        if steps == 30 and length == 1000 and propagation:
            continue
        assert plan_latents([length // 2], recipe, Shots(length), lambda key: False).calls == calls


def test_a_linear_pass_costs_one_call_a_step_every_six_frames():
    recipe, shots, there, counts = Recipe(5, 1, frozenset({3})), Shots(400), set(), []
    for block in range(50):
        plan = plan_block(block, recipe, shots, there.__contains__)
        there |= {key for task in plan.tasks for key in task.makes}
        counts.append(plan.calls)
    assert set(counts[1:]) == {5}


def frames_of(key) -> int:
    return key[3] - key[2] if key[0] in ("v", "deep") else 1


def passes(clip, recipe: Recipe, budget: float, deep: int = 1) -> int:
    """U-Net calls of a linear pass with a store of `budget` bytes; a byte a frame of everything, of features `deep`."""
    shots, store, calls = shots_of(*clip), Store(budget), 0

    def have(key):
        return store.get(key) is not None

    for block in blocks_of(clip[0]):
        store.rank(partial(front(recipe).distance, block=block))
        plan = plan_block(block, recipe, shots, have)
        calls += plan.calls
        for task in plan.tasks:
            for key in task.makes:
                if key[0] != "frame":
                    store.put(key, torch.empty(frames_of(key) * (deep if key[0] == "deep" else 1), dtype=torch.uint8))
    return calls


@settings(max_examples=25)
@given(CLIPS, RECIPES, st.sampled_from([1, 50]))
def test_the_working_set_of_a_linear_pass_suffices(clip, recipe, deep):
    """With cuts anywhere, at most half as many calls again as with no limit; without cuts, hardly one more."""
    budget = working_set(recipe, 1, 1, 1, deep)
    calls = passes(clip, recipe, budget, deep)
    assert calls <= 1.5 * passes(clip, recipe, 10**9)
    assert passes((clip[0], []), recipe, budget, deep) <= 1.05 * passes((clip[0], []), recipe, 10**9) + 1


THRASHING = [
    Recipe(4, 0, frozenset({2})),
    Recipe(5, 1, frozenset({2, 3})),
    Recipe(4, 0, frozenset({2}), reuse=frozenset({1, 3})),
]


@pytest.mark.parametrize("recipe", THRASHING)
def test_less_than_the_working_set_would_thrash(recipe):
    """It is no larger than it must be: a third of it costs half the calls again."""
    clip = (200, [])
    assert passes(clip, recipe, working_set(recipe, 1, 1, 1, 1) // 3) > 1.5 * passes(clip, recipe, 10**9)


@pytest.mark.parametrize("length", [100, 160])
def test_what_a_linear_pass_carries_does_not_grow(length):
    """The front after the last block of a longer pass is the front of `front`, counted anew."""
    recipe, made = Recipe(3, 1, frozenset({1}), reuse=frozenset({2})), set()
    for block in range(length // BLOCK):
        plan = plan_block(block, recipe, Shots(1000), made.__contains__)
        made |= {key for task in plan.tasks for key in task.makes}
    held = [key for key in made if front(recipe).distance(key, block) == 0]
    assert sum(map(frames_of, held)) == front(recipe).frames.total()
