"""How many U-Net calls settings come to."""

from vsuav.schedule import Sampler, Schedule
from vsuav.settings import Settings


def one_of(every: int, steps: int) -> tuple[int, ...]:
    """The steps that reuse features where one of `every` is computed in full."""
    return tuple(step for step in range(steps) if step % every)


def counted(schedule: Schedule, settings: Settings) -> tuple[int, int]:
    """U-Net calls of a window, and at how many of them only the outer ring is computed; a guided call counts twice."""
    timesteps = Sampler(schedule, settings.steps, settings.solver, settings.spacing).timesteps
    weights = [1 + settings.guided(timestep) for timestep in timesteps]
    return sum(weights), sum(weights[step] for step in settings.reuse_steps)
