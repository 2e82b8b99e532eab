"""Networks that cost nothing, for the laws of engine and plugin: what `networks.Networks` gives, without a model.

Every result depends on all the frames, latents and noise that the real networks see, and on which of them are seen
together, so a wrong window, order, chunk, prompt or neighbour changes it.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vsuav.arithmetic import exact_arithmetic
from vsuav.networks import recipe_of
from vsuav.noise import frame_noise
from vsuav.schedule import Sampler, Schedule
from vsuav.settings import Settings
from vsuav.turns import worker

SCHEDULE = Schedule(beta_schedule="scaled_linear", beta_end=0.02, prediction_type="v_prediction", steps_offset=1,
                    set_alpha_to_one=False)  # fmt: skip


class Fake:
    """The methods of `networks.Networks` as small functions.

    Args:
        settings: steps, solver, propagation, prompts and seed are what matters.
        latent_dtype: what latents are kept in.
    """

    def __init__(self, settings: Settings, latent_dtype: torch.dtype = torch.float32):
        self.settings = settings
        self.latent_channels, self.latent_dtype = 4, latent_dtype
        self.sampler = Sampler(SCHEDULE, settings.steps, settings.solver, settings.spacing)
        self.recipe = recipe_of(settings, self.sampler)
        self.worker = worker("fake")
        self.digest = f"fake {settings.digest()} {latent_dtype}"
        self.windows: list[tuple[int, int, int]] = []

    def transposed(self) -> "Fake":
        return self

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Any text will do."""

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        return exact_arithmetic()

    def noise(self, stream: str, frame: int, shape: tuple[int, ...]) -> Tensor:
        return frame_noise(self.settings.seed, stream, frame, shape)

    def window(self, step: int, frames: Sequence[int], latents, low_res, prompt: str, deep=None) -> Tensor:
        """Every frame of the result depends on its place in the window and on all of the window's frames."""
        assert (deep is None) == (step not in self.recipe.reuse)
        self.windows.append((step, frames[0], frames[-1] + 1))
        x = torch.stack(list(latents)).float()
        clean = torch.stack(list(low_res)) + 0.1 * torch.stack(
            [self.noise("lr", n, tuple(low_res[0].shape)) for n in frames]
        )
        place = torch.linspace(0.5, 1.5, len(frames))[:, None, None, None]
        pull = sum(map(ord, prompt)) % 7 / 10 + self.sampler.timesteps[step] / 2000
        joint = (x * place).mean(0, keepdim=True) + clean.mean((0, 1))
        if deep is not None:
            joint = deep + 0.1 * joint
        return 0.6 * torch.sin(x + pull) + 0.3 * joint / place - 0.4 * clean.mean(1, keepdim=True)

    def window_and_deep(self, step: int, frames: Sequence[int], latents, low_res, prompt: str):
        """The deep features depend on the step and on all of the window's frames and latents."""
        deep = torch.cos(torch.stack(list(latents)).float() + step).mean(0) + torch.stack(list(low_res)).mean((0, 1))
        return self.window(step, frames, latents, low_res, prompt), deep

    def deep_bytes(self, height: int, width: int) -> int:
        return self.latent_channels * height * width

    def decode(self, frames: Sequence[int], latents, low_res, beside=None) -> Tensor:
        """Nearest pixels of the input, shifted by a mean over the chunk's latents and by what neighbours change."""
        z = torch.stack(list(latents)).float()
        pictures = torch.stack(list(low_res)) / 2 + 0.5 + 0.05 * torch.sin(z.mean(1, keepdim=True) + z.mean())
        if beside is not None:
            before, after = torch.stack(list(beside)).split(3, dim=1)
            pictures = pictures + 0.1 * before - 0.07 * after
        return pictures.clamp(0, 1).repeat_interleave(4, -1).repeat_interleave(4, -2)

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Some flow that differs from pair to pair, forward and backward roughly inverse, some of it invalid."""
        shift = 2 * (first.mean(0) - second.mean(0))
        turned = torch.stack([shift, shift.flip(-1), -shift.roll(1, 0), -shift.flip(-1)])
        return turned.clamp(-3, 3).contiguous()


class NoOp(Fake):
    """Networks that give back the input, four times as large, pixel for pixel."""

    def window(self, step, frames, latents, low_res, prompt) -> Tensor:
        self.windows.append((step, frames[0], frames[-1] + 1))
        return torch.zeros(len(frames), *latents[0].shape)

    def decode(self, frames, latents, low_res, beside=None) -> Tensor:
        pictures = torch.stack(list(low_res)) / 2 + 0.5
        return pictures.repeat_interleave(4, -1).repeat_interleave(4, -2)
