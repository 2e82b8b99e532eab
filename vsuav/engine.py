"""Runs tasks: the frames of a block of a clip, given networks and the input frames it reads.

The engine plans again when its turn comes, holds what the plan counts on until its last use, and puts everything it
makes into the store, so that the next block finds it. It never asks for frames itself.
"""

import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import blake2b

import torch
from torch import Tensor

from vsuav.degrain import Match, beside, degrained
from vsuav.disk import Disk, program
from vsuav.ensemble import Orientation, averaged
from vsuav.flow import origins
from vsuav.networks import Networks
from vsuav.plan import BLOCK, Key, Plan, Task, cone, front, plan_block, plan_latents, working_set
from vsuav.propagation import blend
from vsuav.shots import Shots
from vsuav.store import Store
from vsuav.tiling import merge
from vsuav.turns import Cancelled, leaving

Progress = Callable[[int, int, float], None]


class Missing(LookupError):
    """What the plan counted on has left the store; the frames `sources` are needed to make it again."""

    def __init__(self, sources: Iterable[int]):
        self.sources = frozenset(sources)
        super().__init__(f"input frames {sorted(self.sources)} are needed")


class Engine:
    """Frames of one clip.

    Args:
        networks: `networks.Networks`, or anything that gives the same methods.
        store: where latents are kept.
        disk: tier for final latents that outlives the process, or None.
    """

    def __init__(self, networks: Networks, store: Store, disk: Disk | None = None):
        self.networks = networks
        self.store = store
        self.disk = disk
        self.counters: Counter[str] = Counter()
        self._runs = {
            "window": self._window, "flow": self._flow, "x0": self._x0, "backward": self._backward,
            "forward": self._forward, "step": self._step, "decode": self._decode,
        }  # fmt: skip

    def plan(self, block: int, shots: Shots) -> Plan:
        """The tasks that `run` would do now; computes nothing."""
        return plan_block(block, self.networks.recipe, shots, lambda key: self._recall(key, shots) is not None)

    def fresh_plan(self, block: int, shots: Shots) -> Plan:
        """The tasks of `block` if nothing were there."""
        return plan_block(block, self.networks.recipe, shots, lambda key: False)

    def working_set(self, height: int, width: int) -> int:
        """Bytes a linear pass over input frames of this size must keep to compute hardly anything twice."""
        pixels = height * width
        recipe, numbers = self.networks.recipe, self.networks.latent_channels * pixels
        deep = self.networks.deep_bytes(height, width) if recipe.reuse else 0
        return working_set(recipe, numbers * self.networks.latent_dtype.itemsize, 4 * numbers, 8 * pixels, deep)

    def run(
        self,
        block: int,
        shots: Shots,
        sources: Mapping[int, Tensor],
        alive: Callable[[], bool] = lambda: True,
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """The decoded frames of `block`: absolute number → "3 4h 4w", float32 in [0, 1].

        Args:
            sources: input frames "3 h w", float32 in [-1, 1], at least those `plan` named.
            alive: asked between tasks; when it says no, the work is dropped.
            progress: called after each task with tasks done, tasks in all, and seconds so far.

        Raises:
            Missing: the store lost what `plan` counted on.
            Cancelled: `alive` said no.
        """
        return self.networks.worker.run(
            lambda: self._run(self._execute, block, shots, sources, alive, progress), self, block
        )

    def latents(self, frames: Iterable[int], shots: Shots, sources: Mapping[int, Tensor]) -> list[Tensor]:
        """Final latents "c h w" of `frames`, for measurements."""
        frames = list(frames)

        def work() -> list[Tensor]:
            held: dict[Key, Tensor] = {}
            plan = plan_latents(frames, self.networks.recipe, shots, self._take(held, shots))
            keys = [("latent", self.networks.recipe.steps, n) for n in frames]
            self._tasks(plan, held, Counter(keys), shots, sources, lambda: True, None)
            return [held[key] for key in keys]

        return self.networks.worker.run(lambda: self._run(work), self, frames[0])

    def _run(self, work: Callable, *arguments):
        with self.networks.arithmetic():
            return work(*arguments)

    def _execute(self, block, shots, sources, alive, progress) -> dict[int, Tensor]:
        self.store.rank(partial(front(self.networks.recipe).distance, block=block))
        held: dict[Key, Tensor] = {}
        plan = plan_block(block, self.networks.recipe, shots, self._take(held, shots))
        wanted = [key for task in plan.tasks for key in task.makes if key[0] == "frame"]
        self._tasks(plan, held, Counter(wanted), shots, sources, alive, progress)
        return {key[1]: held[key] for key in wanted}

    def _take(self, held: dict[Key, Tensor], shots: Shots) -> Callable[[Key], bool]:
        """A `have` for the planner that holds on to what it says is there."""

        def have(key: Key) -> bool:
            value = self._recall(key, shots)
            if value is not None:
                held[key] = value
            return value is not None

        return have

    def _tasks(self, plan: Plan, held, uses: Counter, shots, sources, alive, progress) -> None:
        """Run the tasks; `held` keeps a value until its last use; what `uses` already counts stays."""
        missing = plan.sources - sources.keys()
        if missing:
            raise Missing(missing)
        began = time.monotonic()
        uses.update(key for task in plan.tasks for key in task.reads)
        for done, task in enumerate(plan.tasks, 1):
            if leaving.is_set() or not alive():
                raise Cancelled("the clip is going away")
            values = self._runs[task.kind](task, held, shots, sources)
            self.counters[task.kind] += 1
            for key, value in zip(task.makes, values, strict=True):
                kept = value if key[0] == "frame" else self._keep(key, value, shots)
                if uses[key]:
                    held[key] = kept
            for key in task.reads:
                uses[key] -= 1
                if not uses[key]:
                    held.pop(key, None)
            if progress is not None:
                progress(done, len(plan.tasks), time.monotonic() - began)

    def _recall(self, key: Key, shots: Shots) -> Tensor | None:
        value = self.store.get(key)
        if value is None and self.disk is not None and key[:2] == ("latent", self.networks.recipe.steps):
            value = self.disk.get(self._address(key[2], shots))
            if value is not None:
                value = self.store.put(key, value)
        return value

    def _keep(self, key: Key, value: Tensor, shots: Shots) -> Tensor:
        if self.disk is not None and key[:2] == ("latent", self.networks.recipe.steps):
            self.disk.put(self._address(key[2], shots), value)
        return self.store.put(key, value)

    def _address(self, frame: int, shots: Shots) -> bytes:
        """Name of a final latent on disk: a digest of everything its bits depend on."""
        first, last = cone(frame, self.networks.recipe, shots)
        ends = (shots.cut(first), shots.cut(last + 1))
        name = blake2b(program(), digest_size=20)
        for text in (self.networks.digest, shots.prompt(frame)):
            name.update(struct.pack("<q", len(text.encode())) + text.encode())
        name.update(struct.pack("<qqq??", frame, first, last, *ends))
        for n in range(first, last + 1):
            name.update(shots.digest(n))
        return name.digest()

    def _latent(self, step: int, frame: int, held: Mapping[Key, Tensor], like: Tensor) -> Tensor:
        if step:
            return held["latent", step, frame]
        shape = (self.networks.latent_channels, *like.shape[-2:])
        noise = self.networks.settings.temperature * self.networks.noise("latent", frame, shape)
        return noise.to(self.networks.latent_dtype)

    def _window(self, task: Task, held, shots, sources) -> tuple[Tensor, ...]:
        low_res = [sources[n] for n in task.frames]
        latents = [self._latent(task.step, n, held, low_res[0]) for n in task.frames]
        prompt = shots.prompt(task.frames[0])
        inputs = task.step, task.frames, latents, low_res, prompt
        if self.networks.recipe.keeps(task.step):
            prediction, deep = self.networks.window_and_deep(*inputs)
            return prediction.to(self.networks.latent_dtype), deep
        earlier = (held[key] for key in task.reads if key[0] == "deep")
        return (self.networks.window(*inputs, *earlier).to(self.networks.latent_dtype),)

    def _flow(self, task: Task, held, shots, sources) -> list[Tensor]:
        """The flow of a pair, "4 h w" in half precision, forward first; where the pixels of each frame come from in the
        other, "2 h w"; or both, as wanted.
        """
        motion = self.networks.flow(*(sources[n] for n in task.frames))
        there, back = motion.split(2)
        return [
            motion.half() if kind == "motion" else torch.stack([origins(there, back), origins(back, there)])
            for kind, _ in task.makes
        ]

    def _prediction(self, task: Task, held) -> tuple[Tensor, Tensor]:
        """Latent and merged prediction of the task's frame, both float32."""
        frame = task.frames[0]
        windows = [key for key in task.reads if key[0] == "v"]
        v = merge([held[key][frame - key[2]].float() for key in windows])
        return self._latent(task.step, frame, held, v).float(), v

    def _x0(self, task: Task, held, shots, sources) -> tuple[Tensor]:
        return (self.networks.sampler.predict(task.step, *self._prediction(task, held)),)

    def _backward(self, task: Task, held, shots, sources) -> list[Tensor]:
        return self._chain(task, reversed(task.frames), "x0", lambda n: held["flow", n][0], held)

    def _forward(self, task: Task, held, shots, sources) -> list[Tensor]:
        return self._chain(task, task.frames, "back", lambda n: held["flow", n - 1][1], held)

    def _chain(
        self, task: Task, frames: Iterable[int], kind: str, origin: Callable[[int], Tensor], held: Mapping[Key, Tensor]
    ) -> list[Tensor]:
        """Blend every frame with the one before it; `origin` says where the pixels of a frame come from in that."""
        wanted = {key[2] for key in task.makes}
        made: dict[int, Tensor] = {}
        value = None
        for n in frames:
            current = held[kind, task.step, n]
            value = current if value is None else blend(current, value, origin(n))
            if n in wanted:
                made[n] = value
        return [made[key[2]] for key in task.makes]

    def _step(self, task: Task, held, shots, sources) -> list[Tensor]:
        frame, sampler = task.frames[0], self.networks.sampler
        x, v = self._prediction(task, held)
        clean = held.get(("clean", task.step, frame)) if task.step in self.networks.recipe.propagation else None
        if clean is None:
            clean = sampler.predict(task.step, x, v)
        earlier = [held[key] for key in task.reads if key[0] == "clean" and key[1] < task.step]
        following = sampler.advance(task.step, x, v, clean, earlier).to(self.networks.latent_dtype)
        return [following if key[0] == "latent" else clean for key in task.makes]

    def _decode(self, task: Task, held, shots, sources) -> list[Tensor]:
        latents = [held["latent", task.step, n] for n in task.frames]
        if self.networks.recipe.degrain:
            views = zip(*(self._view(n, task, held, sources) for n in task.frames), strict=True)
        else:
            views = ([sources[n] for n in task.frames],)
        picture = self.networks.decode(task.frames, latents, *views)
        return [picture[key[1] - task.frames[0]] for key in task.makes]

    def _view(self, n: int, task: Task, held, sources) -> tuple[Tensor, Tensor]:
        """What the decoder sees of input frame n, "3 h w", and what it is told of those before and after, "6 h w", from
        the flows that the task reads."""
        matches: list[Match | None] = []
        for other in (n - 1, n + 1):
            pair = "motion", min(n, other)
            ways = held[pair].float().split(2) if pair in task.reads else ()
            matches.append((sources[other], *(ways if other > n else ways[::-1])) if ways else None)
        changes, shares = beside(sources[n], *matches)
        return degrained(sources[n], changes, shares, self.networks.settings.degrain), changes.flatten(0, 1)


def restore(frames: Tensor, networks: Networks, shots: Shots | None = None, cache_mib: int = 1024) -> Tensor:
    """Restore a whole clip without VapourSynth.

    Args:
        frames: "t 3 h w", float32 in [-1, 1].
        shots: where its cuts are; None = one shot with the prompts of the settings.

    Returns:
        "t 3 4h 4w", float32 in [0, 1].
    """
    shots = shots or Shots(len(frames), prompt_at=networks.settings.prompt_at)
    return averaged(partial(_restored, networks, shots, cache_mib), frames, networks.settings.ensemble)


def _restored(networks: Networks, shots: Shots, cache_mib: int, frames: Tensor, orientation: Orientation) -> Tensor:
    length, _, height, width = frames.shape
    networks = networks.transposed() if orientation.transposed else networks
    engine = Engine(networks, Store(cache_mib << 20))
    engine.store.raise_budget(engine.working_set(height, width))
    sources = dict(enumerate(frames.float().contiguous()))
    blocks = (engine.run(block, shots, sources) for block in range(-(-length // BLOCK)))
    return torch.stack([block[n] for block in blocks for n in sorted(block)])
