"""Noise schedules and samplers: DDIM in two halves, few-step solvers, noising of the conditioning frames.

A sampling step is split so that the clean estimate x0 can be edited (propagated along time) in between:

    x0 = Sampler.predict(i, x, v)              v is the network's prediction
    x0 = propagate(x0)                         optional
    x  = Sampler.advance(i, x, v, x0, earlier)

Every solver is written as the DDIM step plus corrections made of differences between clean estimates. The noise
component always comes from the x and v that the network saw and is never recomputed from an edited x0.

Notation: a = sqrt(alpha_cumprod), s = sqrt(1 - alpha_cumprod), l = ln(a / s) (half the log signal-to-noise ratio).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from vsuav.configs import made

SOLVERS = {"ddim": 0, "dpm++2m": 1, "unipc": 2}  # solver: how many earlier clean estimates it reads
SPACINGS = ("leading", "trailing")


@dataclass(frozen=True)
class Schedule:
    """What a `scheduler_config.json` in the diffusers layout says about the noise.

    Missing keys mean what they mean to diffusers, except `clip_sample`, whose absence means no clipping (latents have
    no natural range).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    timestep_spacing: str = "leading"
    clip_sample: bool = False

    FREE = ("beta_start", "beta_end", "steps_offset")

    def __post_init__(self) -> None:
        choices = {
            "beta_schedule": ("scaled_linear", "linear"),
            "prediction_type": ("v_prediction", "epsilon"),
            "timestep_spacing": SPACINGS,
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"Schedule: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"Schedule: betas must satisfy 0 <= beta_start <= beta_end < 1, got {self.beta_start}, {self.beta_end}"
            )

    @classmethod
    def from_config(cls, config: Mapping) -> "Schedule":
        """Read a scheduler config. Keys without influence on the noise are ignored, unsupported settings refused."""
        for name in ("trained_betas", "thresholding", "rescale_betas_zero_snr", "snr_shift_scale"):
            if config.get(name):
                raise ValueError(f"Schedule: {name} is not supported, got {config[name]!r}; it must be null or false")
        known = {field.name for field in fields(cls)}
        return made(cls, {name: value for name, value in config.items() if name in known})

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Share of the signal's variance left at each training step, float32 "num_train_timesteps"."""
        start, end, power = self.beta_start, self.beta_end, 1
        if self.beta_schedule == "scaled_linear":
            start, end, power = start**0.5, end**0.5, 2
        betas = torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float32) ** power
        return torch.cumprod(1.0 - betas, dim=0)

    def signal_and_noise(self, timestep: int) -> tuple[float, float]:
        """Factors (a, s) of signal and noise at `timestep`; below 0 means after the last step."""
        if timestep >= 0:
            alpha = self.alphas_cumprod[timestep].item()
        else:
            alpha = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0].item()
        return math.sqrt(alpha), math.sqrt(1.0 - alpha)


def add_noise(schedule: Schedule, clean: Tensor, noise: Tensor, level: int) -> Tensor:
    """a_level * clean + s_level * noise, any equal shapes: the noised conditioning frames.

    `level` is used directly as the training step; the same number is the network's class label.
    """
    if not 0 <= level < schedule.num_train_timesteps:
        raise ValueError(f"add_noise: level must be between 0 and {schedule.num_train_timesteps - 1}, got {level}")
    signal, sigma = schedule.signal_and_noise(level)
    return (signal * clean.float() + sigma * noise.float()).to(clean.dtype)


def spaced_timesteps(schedule: Schedule, steps: int, spacing: str) -> tuple[int, ...]:
    """Training steps visited by `steps` sampling steps, falling.

    leading:  t_i = (N-1-i) * floor(T/N) + steps_offset     (N = 4: 751 501 251 1)
    trailing: t_i = round(T * (N-i) / N) - 1                (N = 4: 999 749 499 249)
    """
    total = schedule.num_train_timesteps
    if not isinstance(steps, int) or not 1 <= steps <= total:
        raise ValueError(f"Sampler: steps must be between 1 and {total}, got {steps!r}")
    if spacing == "trailing":
        return tuple(round(total * (steps - i) / steps) - 1 for i in range(steps))
    if spacing == "leading":
        stride = total // steps
        times = tuple((steps - 1 - i) * stride + schedule.steps_offset for i in range(steps))
        if times[0] >= total:
            raise ValueError(f"Sampler: steps must be below {total} with leading spacing, got {steps}")
        return times
    raise ValueError(f"Sampler: spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")


class Sampler:
    """A solver on fixed timesteps. All arithmetic is float32 and elementwise; results have the dtype of `x`.

    solver   "ddim": Song et al. 2021, eta = 0.
             "dpm++2m": DPM-Solver++(2M), Lu et al. 2022, data prediction, midpoint, first order at both ends.
             "unipc": UniPC-2 with B2(h) = e^h - 1, Zhao et al. 2023, data prediction, corrector included.
    spacing  "leading", "trailing", or None for what the schedule says.
    """

    def __init__(self, schedule: Schedule, steps: int, solver: str = "ddim", spacing: str | None = None) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"Sampler: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if schedule.prediction_type != "v_prediction":
            raise ValueError(
                f"Sampler: prediction_type must be v_prediction to sample, got {schedule.prediction_type!r}"
            )
        if schedule.clip_sample:
            raise ValueError("Sampler: clip_sample must be false to sample latents, got True")
        self.solver = solver
        self.history = SOLVERS[solver]
        self.timesteps = spaced_timesteps(schedule, steps, spacing or schedule.timestep_spacing)
        self._factors = [schedule.signal_and_noise(t) for t in (*self.timesteps, -1)]
        if self.history and not self._falls():
            raise ValueError(
                f"Sampler: solver {solver} needs a noise that falls from step to step and is neither all nor nothing; "
                "ddim takes any schedule"
            )

    def predict(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """Clean estimate of step i from the state x and the prediction v (any equal shapes): a x - s v."""
        signal, sigma = self._factors[i]
        return (signal * x.float()).sub_(sigma * v.float()).to(x.dtype)

    def advance(self, i: int, x: Tensor, v: Tensor, x0: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """State of step i+1.

        x, v     what the network saw and predicted at step i
        x0       `predict(i, x, v)`, possibly edited
        earlier  the (edited) clean estimates of steps i-1, i-2, …, newest first; at least min(i, history) of them
        """
        if len(earlier) < (needed := min(i, self.history)):
            raise ValueError(f"Sampler: {self.solver} needs {needed} earlier estimates at step {i}, got {len(earlier)}")
        signal, sigma = self._factors[i]
        next_signal, next_sigma = self._factors[i + 1]
        x0_now = x0.float()
        noise = (signal * v.float()).add_(sigma * x.float())
        result = (next_signal * x0_now).add_(noise.mul_(next_sigma))
        estimates = [x0_now, *(estimate.float() for estimate in earlier[:needed])]
        if self.solver == "unipc" and i > 0:
            result = result + (next_sigma / sigma) * self._corrected(i, estimates)
        if self._order(i) == 2:
            result = result + self._second_order(i, estimates[0], estimates[1])
        return result.to(x.dtype)

    def _order(self, i: int) -> int:
        """Order of the prediction made at step i: one at the start and at the end, where differences say little."""
        return 2 if self.history and 0 < i < len(self.timesteps) - 1 else 1

    def _falls(self) -> bool:
        """Whether `_log_ratio` exists at every step, and rises."""
        factors = self._factors[:-1]
        usable = all(signal > 0 and sigma > 0 for signal, sigma in factors)
        return usable and all(a[0] * b[1] < b[0] * a[1] for a, b in itertools.pairwise(factors))

    def _log_ratio(self, i: int) -> float:
        signal, sigma = self._factors[i]
        return math.log(signal / sigma)

    def _gaps(self, i: int) -> tuple[float, float]:
        """h = l_{i+1} - l_i and the ratio r = (l_i - l_{i-1}) / h."""
        gap = self._log_ratio(i + 1) - self._log_ratio(i)
        return gap, (self._log_ratio(i) - self._log_ratio(i - 1)) / gap

    def _second_order(self, i: int, now: Tensor, before: Tensor) -> Tensor:
        """What second order adds to the DDIM step from i to i+1: a_{i+1} (1 - e^-h) / (2r) (x0_i - x0_{i-1})."""
        gap, ratio = self._gaps(i)
        return (self._factors[i + 1][0] * -math.expm1(-gap) / (2 * ratio)) * (now - before)

    def _corrected(self, i: int, estimates: Sequence[Tensor]) -> Tensor:
        """UniC: the shift of the state at step i, once its clean estimate is known (UniPC, algorithm 1).

        The predictor of the step i-1 → i and its corrector share their first terms, so their difference needs clean
        estimates only, not the state at i-1. Coefficients solve R rho = b of the paper for the order of that step.
        """
        gap = self._log_ratio(i) - self._log_ratio(i - 1)
        scale = self._factors[i][0] * -math.expm1(-gap)
        if self._order(i - 1) == 1:
            return (0.5 * scale) * (estimates[0] - estimates[1])
        place = -self._gaps(i - 1)[1]  # of the older estimate, in units of h behind step i-1
        phi = math.expm1(-gap) / -gap - 1
        first = phi / math.expm1(-gap)
        second = (phi / -gap - 0.5) * 2 / math.expm1(-gap)
        rho_new = (second - place * first) / (1 - place)
        rho_old = first - rho_new
        now, before, older = estimates
        return scale * ((rho_old - 0.5) / place * (older - before) + rho_new * (now - before))
