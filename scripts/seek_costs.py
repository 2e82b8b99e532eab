"""Prints, as Markdown, how many U-Net calls a frame costs: in a linear pass, after a seek, after a restart.

Nothing is computed: the planner says what it would do. The page docs/costs.md holds what this prints:

    python scripts/seek_costs.py > docs/costs.md
"""

from collections.abc import Callable, Iterable

from vsuav.plan import Key, Recipe, plan_block
from vsuav.shots import Shots
from vsuav.tiling import BLOCK, STRIDE, WINDOW

LENGTH = 1000
"""Frames of the clip of one shot."""
RECIPES = [
    ("2 steps", Recipe(2)),
    ("2 steps, propagation at 1 (the bundled model's default)", Recipe(2, 0, frozenset({1}))),
    ("4 steps", Recipe(4)),
    ("4 steps, propagation at 2", Recipe(4, 0, frozenset({2}))),
    ("10 steps", Recipe(10)),
    ("10 steps, propagation at 7", Recipe(10, 0, frozenset({7}))),
    ("30 steps", Recipe(30)),
    ("30 steps, propagation at 24, 26, 28", Recipe(30, 0, frozenset({24, 26, 28}))),
]

HEAD = """\
# What a frame costs

A *call* is one run of the U-Net on a window of eight frames, and nearly all of the time goes into calls. How many a
request needs is known before anything is computed. This page is what `scripts/seek_costs.py` prints: for a clip of
{length} frames, in one shot and with `max_shot=48`, propagation radius 16.

* **linear**: calls for six more frames of an encode.
* **cold seek**: calls for the first picture of the middle of the clip when nothing was computed before. It comes with
  the five frames around it.
* **seek back**: calls for a frame that was shown before and whose latents are still in memory (`cache_mib`).
* **restart**: calls when a script is opened again with `cache_dir`: for a frame that was made before, and for six
  frames right behind the place where an encode was broken off. The second is one cold seek, once.
* **LR frames**: input frames that its result depends on.

| | linear | cold seek | its LR frames | seek back | restart: old frame | restart: next frames |
|---|---|---|---|---|---|---|"""

TAIL = """
Cuts cost little: at most two calls a step for each. Cutting the clip with `max_shot` bounds what a seek costs, and
changes pixels near the forced cuts.

## Beside the original program

The original program computes a whole clip at once and cannot show one frame without all the others. Calls for a clip
of one shot:

| frames | {columns} | the original's |
|---|{rule}|---|"""


def calls(recipe: Recipe, shots: Shots, blocks: Iterable[int], have: Callable[[Key], bool]) -> int:
    """Calls that the blocks need, each planned with what the ones before have made."""
    made: set[Key] = set()
    total = 0
    for block in blocks:
        plan = plan_block(block, recipe, shots, lambda key: key in made or have(key))
        made.update(key for task in plan.tasks for key in task.makes)
        total += plan.calls
    return total


def row(name: str, recipe: Recipe, max_shot: int | None) -> str:
    """One line of the table."""
    shots = Shots(LENGTH, max_shot=max_shot)
    middle = LENGTH // 2 // BLOCK
    linear = calls(recipe, shots, range(middle + 8), _nothing) - calls(recipe, shots, range(middle), _nothing)
    cold = plan_block(middle, recipe, shots, _nothing)
    stored = calls(recipe, shots, [middle], lambda key: _final(key, recipe))
    following = calls(recipe, shots, [middle], lambda key: _final(key, recipe) and key[2] < middle * BLOCK)
    cells = (f"{linear / 8:g}", cold.calls, len(cold.sources), 0, stored, following)
    shot = f", `max_shot={max_shot}`" if max_shot else ""
    return " | ".join(["| " + name + shot, *map(str, cells)]) + " |"


def reference(frames: int, steps: int) -> int:
    """Window calls of the original program: it repeats the last one of some lengths."""
    return steps * (1 if frames <= WINDOW else len(range(0, frames, STRIDE)))


def whole(frames: int, recipe: Recipe) -> int:
    """Our calls for a whole clip of one shot."""
    return calls(recipe, Shots(frames), range(-(-frames // BLOCK)), _nothing)


def _nothing(key: Key) -> bool:
    return False


def _final(key: Key, recipe: Recipe) -> bool:
    return key[:2] == ("latent", recipe.steps)


def main() -> None:
    print(HEAD.format(length=LENGTH))
    for name, recipe in RECIPES:
        for max_shot in (None, 48):
            print(row(name, recipe, max_shot), flush=True)
    steps = (4, 10, 30)
    print(TAIL.format(columns=" | ".join(f"{n} steps" for n in steps), rule="---|" * (len(steps) - 1) + "---"))
    for frames in (8, 13, 14, 16, 48, 200, 1000):
        ours = [str(whole(frames, Recipe(n))) for n in steps]
        theirs = ", ".join(str(reference(frames, n)) for n in steps)
        print(f"| {frames} | {' | '.join(ours)} | {theirs} |")


if __name__ == "__main__":
    main()
