"""The engine against a plain loop over whole shots: windows, guidance by the sampler, propagation, decoding.

The loop follows the algorithm page, sections 5 to 9, with no store, no planner and no frame asked for twice.
"""

import random

import pytest
import torch
from fakes import Fake, NoOp

from vsuav.degrain import beside, degrained
from vsuav.disk import Disk
from vsuav.engine import Engine, Missing, restore
from vsuav.propagation import backward_start, forward_start, link, propagate
from vsuav.settings import Settings
from vsuav.shots import Record, Shots
from vsuav.store import Store
from vsuav.turns import Cancelled

SIZE = (10, 12)
CUTS = (5, 6, 7, 13)
"""A shot of five frames, two of one frame, one of six, and the rest."""


def clip(length: int, seed: int = 0) -> torch.Tensor:
    """Smooth frames "t 3 h w" in [-1, 1] that move."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tanh(torch.randn(length, 3, *SIZE, generator=generator).cumsum(0) * 0.3)


def shots_of(length: int, cuts=CUTS, prompts: dict[int, str] | None = None) -> Shots:
    return Shots(length, lambda n: Record(cut_before=n in cuts, prompt=(prompts or {}).get(n)))


def reference_loop(frames: torch.Tensor, networks: Fake, cuts, prompt=lambda n: "", whole=True) -> torch.Tensor:
    """Restored frames "t 3 4h 4w", shot by shot.

    `whole` propagates over whole shots as the reference does; False truncates the chains, one frame at a time.
    """
    ends = [0, *(cut for cut in cuts if cut < len(frames)), len(frames)]
    pairs = zip(ends, ends[1:], strict=False)
    return torch.cat([reference_shot(frames, networks, a, b, prompt(a), whole) for a, b in pairs])


def reference_shot(frames, networks: Fake, a: int, b: int, prompt: str, whole: bool) -> torch.Tensor:
    sampler, settings = networks.sampler, networks.settings
    shot, low = range(a, b), frames[a:b]
    x = torch.stack([networks.noise("latent", n, (4, *SIZE)) for n in shot]) * settings.temperature
    x = x.to(networks.latent_dtype)
    flows = [networks.flow(low[i], low[i + 1]) for i in range(b - a - 1)]
    cleans: list[torch.Tensor] = []
    deeps: dict[int, torch.Tensor] = {}
    for step in range(settings.steps):
        v = torch.zeros(b - a, 4, *SIZE)
        seen = set()
        firsts = [a] if b - a <= 8 else [min(max(6 * i, a), b - 8) for i in range(a // 6, (b - 1) // 6 + 1)]
        for first in firsts:
            span = range(first, min(first + 8, b))
            inputs = step, span, x[first - a : span.stop - a], frames[first : span.stop], prompt
            if step in settings.reuse_steps:
                predicted = networks.window(*inputs, deeps[first])
            else:
                predicted, deeps[first] = networks.window_and_deep(*inputs)
            predicted = predicted.to(networks.latent_dtype).float()
            for n in span:
                old = v[n - a]
                v[n - a] = 0.5 * old + 0.5 * predicted[n - first] if n in seen else predicted[n - first]
                seen.add(n)
        x0 = sampler.predict(step, x.float(), v)
        if step in settings.propagation_steps and b - a > 1:
            x0 = (propagated if whole else truncated)(x0, flows, a, settings.propagation_radius)
        x = sampler.advance(step, x.float(), v, x0, cleans[::-1][: sampler.history]).to(networks.latent_dtype)
        cleans.append(x0)
    pictures = []
    n = a
    while n < b:
        chunk = range(n, min(n + 3, b))
        keep = min((n // 3 + 1) * 3, b)
        views = zip(*(view(m, low, flows, a, settings.degrain) for m in chunk), strict=True)
        if not settings.degrain:
            views = (low[n - a : chunk.stop - a],)
        pictures.append(networks.decode(chunk, x[n - a : chunk.stop - a], *views)[: keep - n])
        n = keep
    return torch.cat(pictures)


def view(m, low, flows, a, weight):
    """Frame m of the shot `low`, which begins at `a`, with those beside it in the shot; and what they would change."""
    here, matches = m - a, [None, None]
    for i, other in enumerate((here - 1, here + 1)):
        if 0 <= other < len(low):
            forward, backward = flows[min(here, other)].half().float().split(2)
            matches[i] = (low[other], *((forward, backward) if other > here else (backward, forward)))
    changes, shares = beside(low[here], *matches)
    return degrained(low[here], changes, shares, weight), torch.cat([*changes])


def propagated(x0, flows, a, radius):
    forward, backward = (torch.stack(way, 1)[None] for way in zip(*(flow.split(2) for flow in flows), strict=True))
    return propagate(x0.transpose(0, 1)[None], forward, backward)[0].transpose(0, 1)


def truncated(x0, flows, a, radius):
    """Each frame's own two chains, by their definition."""
    b = a + len(x0)

    def chain(values, m, start, way):
        value = values[start - a]
        for i in range(start + way, m + way, way):
            pair = flows[min(i, i - way) - a].split(2)
            given = (values[i - a], value, *(pair if way < 0 else pair[::-1]))
            value = link(*(v[None] for v in given))[0]
        return value

    back = torch.stack([chain(x0, m, backward_start(m, radius, b), -1) for m in range(a, b)])
    return torch.stack([chain(back, m, forward_start(m, radius, a), 1) for m in range(a, b)])


def run(engine: Engine, frames, shots, blocks) -> dict[int, torch.Tensor]:
    """Frames of `blocks`, given only the sources the plan names."""
    results = {}
    for block in blocks:
        sources = {n: frames[n] for n in engine.plan(block, shots).sources}
        results |= engine.run(block, shots, sources)
    return results


SETTINGS = {
    "ddim": Settings(steps=3, solver="ddim", propagation_steps=(1,), propagation_radius=4),
    "dpm++2m": Settings(steps=4, solver="dpm++2m", propagation_steps=(1, 3), propagation_radius=3),
    "unipc": Settings(steps=4, solver="unipc", propagation_steps=(2,), propagation_radius=5),
    "reuse": Settings(steps=4, propagation_steps=(2,), propagation_radius=4, reuse_steps=(1, 2)),
    "reuse, dpm++2m": Settings(steps=5, solver="dpm++2m", reuse_steps=(1, 3, 4)),
    "plain": Settings(steps=2),
    "one step": Settings(steps=1, propagation_steps=(0,)),
    "cool": Settings(steps=3, temperature=0.3, propagation_steps=(1,), propagation_radius=4),
    "cold": Settings(steps=2, temperature=0.0),
    "degrain": Settings(steps=2, degrain=0.7),
    "degrain, propagated": Settings(steps=3, propagation_steps=(1,), propagation_radius=4, degrain=0.3),
}


CASES = [(name, torch.float32, cuts) for name in SETTINGS for cuts in ((), CUTS)] + [("ddim", torch.float16, CUTS)]


@pytest.mark.parametrize(("name", "dtype", "cuts"), CASES)
def test_the_engine_is_the_plain_loop(name, dtype, cuts):
    frames, settings = clip(40), SETTINGS[name]
    expected = reference_loop(frames, Fake(settings, dtype), cuts, whole=False)
    networks = Fake(settings, dtype)
    engine, shots = Engine(networks, Store(1 << 30)), shots_of(40, cuts)
    results = run(engine, frames, shots, range(7))
    assert sorted(results) == list(range(40))
    for n in range(40):
        torch.testing.assert_close(results[n], expected[n], rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-3)
    assert len(networks.windows) == len(set(networks.windows))


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 13, 14, 17])
def test_short_shots_are_the_reference_exactly(length):
    """Up to R + 1 frames nothing is cut off: whole-shot propagation."""
    settings = Settings(steps=3, propagation_steps=(0, 2), propagation_radius=16)
    frames = clip(length + 9)
    cuts = (length,)
    expected = reference_loop(frames, Fake(settings), cuts)
    got = restore(frames, Fake(settings), shots_of(length + 9, cuts))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_prompts_change_at_cuts_and_reach_the_windows():
    frames, settings = clip(20), Settings(steps=2)
    prompts = {n: "rain" for n in range(8, 14)}
    expected = reference_loop(frames, Fake(settings), (8, 14), lambda n: prompts.get(n, ""))
    got = restore(frames, Fake(settings), shots_of(20, (), prompts))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(got, restore(frames, Fake(settings)), atol=1e-3)


class Still(NoOp):
    """Gives the input back, and says that nothing moves."""

    def flow(self, first, second):
        return torch.zeros(4, *first.shape[-2:])


def test_degrain_averages_frames_with_those_beside_them_up_to_the_cut():
    generator = torch.Generator().manual_seed(1)
    frames = torch.cat([torch.full((n, 3, *SIZE), grey) for n, grey in ((8, -0.5), (1, 0.0), (12, 0.02))])
    frames += 0.002 * torch.randn(frames.shape, generator=generator)
    got = restore(frames, Still(Settings(steps=1, degrain=1.0)), shots_of(21, (8, 9)))[..., ::4, ::4] * 2 - 1
    for n in range(21):
        a, b = next((a, b) for a, b in ((0, 8), (8, 9), (9, 21)) if a <= n < b)
        mean = frames[max(a, n - 1) : min(b, n + 2)].mean(0)
        torch.testing.assert_close(got[n], mean, rtol=0, atol=1e-5)


def random_flows(generator, length: int, shape) -> list[torch.Tensor]:
    """Flow pairs, roughly inverse to each other, with a third of the pixels occluded."""
    flows = []
    for _ in range(length - 1):
        forward = torch.randint(-2, 3, (2, 1, 1), generator=generator).float() + 0.1
        forward = forward.expand(2, *shape).clone()
        backward = -forward.clone()
        backward[:, torch.rand(shape, generator=generator) < 0.3] += 4
        flows.append(torch.cat([forward, backward]))
    return flows


@pytest.mark.parametrize(("length", "radius"), [(2, 2), (7, 6), (17, 16), (60, 2), (60, 6)])
def test_truncated_chains_stay_within_their_bound(length, radius):
    """60 frames, random flows and occlusions: exact up to R + 1 frames, else within 4 * 2^-R * max|x|."""
    generator = torch.Generator().manual_seed(length + radius)
    x0 = torch.randn(length, 4, *SIZE, generator=generator)
    flows = random_flows(generator, length, SIZE)
    for first in (0, 4):
        whole, cut = propagated(x0, flows, first, radius), truncated(x0, flows, first, radius)
        worst = (whole - cut).abs().max().item()
        assert worst <= 4 * 2.0**-radius * x0.abs().max().item()
        if length <= radius + 1:
            assert worst == 0
        if length == 60 and radius == 2:
            assert worst > 1e-4


ORDERS = {
    "linear": lambda blocks: blocks,
    "reverse": lambda blocks: blocks[::-1],
    "random": lambda blocks: random.Random(3).sample(blocks, len(blocks)),
    "strided": lambda blocks: [block for i in range(3) for block in blocks[i::3]],
    "back and forth": lambda blocks: [*blocks, *blocks[::-1], *blocks[::2]],
}


@pytest.mark.parametrize(
    ("order", "budget"),
    [("linear", 20_000), ("reverse", 0), ("random", 1 << 30), ("strided", 20_000), ("back and forth", 1 << 30)],
)
@pytest.mark.parametrize("name", ["unipc", "reuse"])
def test_order_and_budget_change_no_bit(order, budget, name):
    frames, settings, shots = clip(33), SETTINGS[name], shots_of(33)
    expected = restore(frames, Fake(settings), shots)
    engine = Engine(Fake(settings), Store(budget))
    results = run(engine, frames, shots, ORDERS[order](list(range(6))))
    assert all(torch.equal(results[n], expected[n]) for n in range(33))
    assert engine.store.bytes <= budget


@pytest.mark.parametrize("block", [0, 2, 5])
def test_a_cold_block_has_the_same_bits(block):
    frames, settings, shots = clip(33), SETTINGS["ddim"], shots_of(33)
    expected = restore(frames, Fake(settings), shots)
    engine = Engine(Fake(settings), Store(1 << 30))
    assert all(torch.equal(picture, expected[n]) for n, picture in run(engine, frames, shots, [block]).items())


def test_a_linear_pass_at_the_smallest_budget_costs_little_more():
    """With the budget raised to the working set: at most half as many calls again as with no limit."""
    for settings in (SETTINGS["ddim"], SETTINGS["plain"], SETTINGS["reuse"]):
        frames, shots = clip(72), shots_of(72, (*CUTS, 40, 41))
        calls = []
        for budget in (1, 1 << 30):
            networks = Fake(settings)
            engine = Engine(networks, Store(budget))
            if budget == 1:
                assert engine.store.raise_budget(engine.working_set(*SIZE))
            run(engine, frames, shots, range(12))
            calls.append(len(networks.windows))
        assert calls[0] <= 1.5 * calls[1]


@pytest.mark.parametrize("name", ["dpm++2m", "reuse"])
def test_the_price_is_known_before(name):
    settings = SETTINGS[name]
    frames, shots = clip(30), shots_of(30)
    for order in ("random", "back and forth"):
        networks = Fake(settings)
        engine = Engine(networks, Store(100_000))
        for block in ORDERS[order](list(range(5))):
            price, before = engine.plan(block, shots), len(networks.windows)
            engine.run(block, shots, {n: frames[n] for n in price.sources})
            assert len(networks.windows) - before == price.calls


@pytest.mark.parametrize("name", ["ddim", "reuse"])
def test_it_reads_the_sources_of_the_plan_and_no_other(name):
    settings = SETTINGS[name]
    frames, shots = clip(60), shots_of(60)

    class Watched(dict):
        def __getitem__(self, n):
            read.add(n)
            return super().__getitem__(n)

    for blocks in ([4], [0, 1, 2], [9, 2]):
        engine = Engine(Fake(settings), Store(1 << 30))
        for block in blocks:
            read: set[int] = set()
            wanted = engine.plan(block, shots).sources
            engine.run(block, shots, Watched(enumerate(frames)))
            assert read == wanted


@pytest.mark.parametrize("name", ["ddim", "reuse"])
def test_what_was_planned_on_and_lost_is_named(name):
    frames, shots = clip(50), shots_of(50, ())
    engine = Engine(Fake(SETTINGS[name]), Store(1 << 30))
    run(engine, frames, shots, [3])
    few = engine.plan(3, shots).sources
    engine.store.clear()
    with pytest.raises(Missing) as caught:
        engine.run(3, shots, {n: frames[n] for n in few})
    assert caught.value.sources
    everything = engine.fresh_plan(3, shots).sources
    assert caught.value.sources | few <= everything
    again = engine.run(3, shots, {n: frames[n] for n in everything})
    expected = restore(frames, Fake(SETTINGS[name]), shots)
    assert all(torch.equal(picture, expected[n]) for n, picture in again.items())


@pytest.mark.parametrize("name", ["unipc", "reuse", "reuse, dpm++2m"])
def test_what_a_run_needs_is_held_while_another_store_would_have_lost_it(name):
    """The store is emptied after every task; the run goes on with what it holds."""
    frames, shots = clip(50), shots_of(50)
    expected = restore(frames, Fake(SETTINGS[name]), shots)
    engine = Engine(Fake(SETTINGS[name]), Store(1 << 30))
    sources = dict(enumerate(frames))
    for block in (3, 4):
        pictures = engine.run(block, shots, sources, progress=lambda *state: engine.store.clear())
        assert all(torch.equal(picture, expected[n]) for n, picture in pictures.items())


def test_nothing_stays_pinned():
    import gc

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    frames, shots = clip(36), shots_of(36)
    engine = Engine(Fake(SETTINGS["ddim"]), Store(0))
    sources = dict(enumerate(frames))
    engine.run(3, shots, sources)
    before = tensors()
    for block in (5, 2):
        engine.run(block, shots, sources)
    assert tensors() <= before


def test_cancelling_stops_between_tasks():
    frames, shots = clip(50), shots_of(50)
    networks = Fake(SETTINGS["ddim"])
    engine, asked = Engine(networks, Store(1 << 30)), []

    def alive():
        asked.append(len(networks.windows))
        return len(asked) < 10

    with pytest.raises(Cancelled):
        engine.run(4, shots, dict(enumerate(frames)), alive)
    assert len(asked) == 10
    assert sum(engine.counters.values()) == 9
    expected = restore(frames, Fake(SETTINGS["ddim"]), shots)
    assert all(torch.equal(picture, expected[n]) for n, picture in run(engine, frames, shots, [4]).items())


def test_progress_counts_every_task():
    frames, shots, seen = clip(20), shots_of(20), []
    engine = Engine(Fake(SETTINGS["plain"]), Store(1 << 30))
    total = len(engine.plan(1, shots).tasks)
    engine.run(1, shots, dict(enumerate(frames)), progress=lambda done, of, seconds: seen.append((done, of)))
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_the_first_frame_after_a_cut_knows_nothing_of_what_was_before():
    settings, shots = SETTINGS["dpm++2m"], shots_of(30)
    one, other = clip(30, seed=0), clip(30, seed=1)
    expected = restore(one, Fake(settings), shots)
    for cut in (5, 13):
        mixed = torch.cat([other[:cut], one[cut:]])
        assert torch.equal(restore(mixed, Fake(settings), shots)[cut:], expected[cut:])
    mixed = torch.cat([one[:13], other[13:]])
    assert torch.equal(restore(mixed, Fake(settings), shots)[:13], expected[:13])


def digested(frames: torch.Tensor, cuts=CUTS, prompts=None, tag=b"") -> Shots:
    """Shots whose records carry a digest of the frame, as a disk tier wants them."""
    return Shots(
        len(frames),
        lambda n: Record(
            cut_before=n in cuts, prompt=(prompts or {}).get(n), digest=tag + frames[n].numpy().tobytes()[:64]
        ),
    )


def test_a_stored_latent_is_never_made_again(tmp_path):
    settings, frames = SETTINGS["dpm++2m"], clip(50)
    expected = restore(frames, Fake(settings), shots_of(50))
    networks = Fake(settings)
    run(Engine(networks, Store(1 << 30), Disk(tmp_path, 1 << 30)), frames, digested(frames), range(6))
    again = Fake(settings)
    engine = Engine(again, Store(1 << 30), Disk(tmp_path, 1 << 30))
    results = run(engine, frames, digested(frames), [4, 0, 3, 5, 2, 1])
    assert again.windows == []
    assert all(torch.equal(results[n], expected[n]) for n in results)
    fresh = Engine(Fake(settings), Store(0), None)
    cold = fresh.plan(6, shots_of(50)).calls
    results = run(engine, frames, digested(frames), [6, 7])
    assert len(again.windows) <= cold + 2 * settings.steps
    assert all(torch.equal(results[n], expected[n]) for n in results)


def test_latents_of_another_clip_prompt_cut_place_or_setting_are_not_served(tmp_path):
    settings, frames = Settings(steps=2, propagation_steps=(1,), propagation_radius=2), clip(40)
    run(Engine(Fake(settings), Store(1 << 30), Disk(tmp_path, 1 << 30)), frames, digested(frames), range(6))
    changed = frames.clone()
    changed[17] += 0.1
    cases = {
        "source": (changed, digested(changed), settings),
        "prompt": (frames, digested(frames, prompts=dict.fromkeys(range(13, 40), "rain")), settings),
        "cut": (frames, digested(frames, (*CUTS, 20)), settings),
        "place": (frames[1:], digested(frames[1:], [cut - 1 for cut in CUTS]), settings),
        "seed": (frames, digested(frames), Settings(steps=2, propagation_steps=(1,), propagation_radius=2, seed=1)),
        "steps": (frames, digested(frames), Settings(steps=3, propagation_steps=(1,), propagation_radius=2)),
    }
    for name, (source, shots, other) in cases.items():
        networks = Fake(other)
        results = run(Engine(networks, Store(1 << 30), Disk(tmp_path, 1 << 30)), source, shots, [2, 3])
        expected = restore(source, Fake(other), shots)
        assert all(torch.equal(results[n], expected[n]) for n in results), name
        assert networks.windows, name


def test_a_change_outside_the_cone_costs_nothing(tmp_path):
    settings, frames = Settings(steps=2), clip(60)
    run(Engine(Fake(settings), Store(1 << 30), Disk(tmp_path, 1 << 30)), frames, digested(frames, ()), range(10))
    changed = frames.clone()
    changed[50:] = 0
    networks = Fake(settings)
    run(Engine(networks, Store(1 << 30), Disk(tmp_path, 1 << 30)), changed, digested(changed, ()), range(4))
    assert networks.windows == []


def test_final_latents_for_measurements():
    frames, settings = clip(20), SETTINGS["plain"]
    networks = Fake(settings)
    engine = Engine(networks, Store(1 << 30))
    latents = engine.latents([3, 9], shots_of(20, ()), dict(enumerate(frames)))
    run(engine, frames, shots_of(20, ()), range(4))
    assert all(torch.equal(engine.store.get(("latent", 2, n)), z) for n, z in zip([3, 9], latents, strict=True))
