"""Train a model, stage by stage, after the strategy of Upscale-A-Video.

    python scripts/train.py STAGE --config scripts/mini.json --data data --out runs/mini [--steps N] [--resume]

    vae        encoder and conditioned decoder of a given code: the strongest components of what enlarging loses
    unet       the spatial U-Net on pictures: v-prediction, noised low resolution concatenated, level as class label
    fewstep    the U-Net (later with the decoder) on the DECODED picture, at the states its own sampler really visits
    temporal   the spatial layers frozen, the temporal ones on clips
    vae_video  the decoder with its 3-D layers, on clips and latents of the sampler
    vae_image  the plain decoder, on stills and latents of the sampler
    enlarger   the decoder's enlarger alone, which sees no latents

A stage of the configuration may have any name where its "as" says which of these it is (in mini.json `settle`,
`refine`, `tell` and `refresh` are `fewstep` again, `steady`, `steadier`, `faithful`, `steadiest`, `sharper`,
`together`, `light`, `whole`, `keen`, `broad`, `broadly`, `calmer`, `firm` and `apart` are `temporal`, `deepen`,
`polish`, `clear`, `trust`, `joined`, `keener`, `met`, `plainly` and `nearer` are `vae_video`, `meeting`, `grown`,
`longer` and `beside` are `enlarger`, and `encoder` is `vae` with the encoder alone).

A step takes the mean gradient of the stage's "parts", batches that each may change what the stage says of its data
(pictures beside clips, or several clips); without them it takes one batch. A `temporal` stage with a rate for "image"
trains the image model too, the layers it froze, but on pictures alone: on clips it stays frozen.

With "degrain" in the stage the decoder sees the low resolution as it does when the model is used with that weight
(`vsuav.degrain`), and an enlarger that can be told hears of the frames before and after. With "drift" pictures become
clips: a view that moves over the picture by up to so many pixels a frame.

With "again" in the stage every batch serves that many steps, mirrored and turned another way in each: where making
batches takes longer than learning from them. With "also" it begins with parts of the networks from other stages.

A step is a pure function of the weights, the optimizer and the step's number: the batch and all noise are seeded by
(seed, stage, number of the batch, process). So a run that is stopped and resumed gives the same bits as one that was
not. Runs on one CPU thread or, through `accelerate launch`, on many GPUs.

    python scripts/train.py temporal --config scripts/large.json --init FOLDER …

starts from any model folder vsuav can load (an inflated Stable Diffusion x4 upscaler, the released one, the bundled
one): networks, schedules and prompts' states are the folder's, the configuration only says how to train. Stages
without a "sampler" train as the paper does, `temporal` by v-prediction at any noise, `vae_video` on the encoder's own
latents. The next stage goes on from OUT, without `--init`.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from adopt import DESCRIBED, adopt
from degrade import CLEAN, blur, degrade
from fastnorm import speed_up
from linear_code import encode
from perceptual import STLPIPS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vsuav.degrain import Match, degrained
from vsuav.degrain import beside as neighbours
from vsuav.flow import DIS, valid, warp
from vsuav.layers import clip, frames, lay_out
from vsuav.propagation import propagate
from vsuav.schedule import Sampler, Schedule
from vsuav.text import read_prompts, write_prompts
from vsuav.unet import UNetConfig, UNetVideo, set_temporal, temporal_parameters
from vsuav.vae import VAE, VAEConfig

STAGES = ("vae", "unet", "fewstep", "temporal", "vae_video", "vae_image", "enlarger")
LOOKS = ("film grain", "blur", "black and white", "high contrast", "noise", "jpeg artifacts")
SHOWN = (2, 1, 2, 1, 1, 1, 1)
"""How often each of the looks, and last BAD, is trained."""
GOOD = ("", "best quality, extremely detailed")
BAD = "blur, worst quality"
PROMPTS = (*GOOD, BAD, *LOOKS)
NETWORKS = ("unet", "vae", "vae_video")
LEVELS = (0, 20, 60, 120, 200)
"""The noise levels trained. Each level has its own row in the class table; the rows between are interpolated."""
OFTEN = (0.45, 0.25, 0.1, 0.1, 0.1)
PIXELS, PERCEPT, FLICKER = (3.0, 1.0, 1.0, 1.0, 1.0), (0.05, 0.8, 0.9, 1.1, 1.4), (1.0, 1.0, 1.0, 1.0, 1.0)
NONE = (0.0, 0.0, 0.0, 0.0, 0.0)
"""How often each is trained, and what an error of pixels, of perception, of steadiness and a decibel weigh there (if a
stage does not say so itself, as "often", "pixels", "percept", "flicker" and "psnr"): a knob needs clear ends. Without
"psnr" decibels weigh `NONE`, and without "cold" or "propagated" as many samplings start without noise or end with
propagation."""
ALONE = 0.1
"""How often each neighbour of a frame is kept from a decoder that sees it with "degrain", as at the ends of shots."""
PART = ("data", "batch", "frames", "size", "strength", "clean", "looks", "drift")
"""What a part of a step may say of its batch."""


def seeded(*parts: Any) -> int:
    """A 63-bit seed that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def look(frames: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """What the target of a prompt looks like; "t h w 3" uint8 to the same."""
    result = []
    for frame in frames.astype(np.float32):
        if name in ("blur", BAD):
            frame = blur(frame, 2.2, 2.2, 0)
        if name == "film grain":
            frame = frame + 18 * rng.standard_normal((*frame.shape[:2], 1), dtype=np.float32)
        elif name == "noise":
            frame = frame + 16 * rng.standard_normal(frame.shape, dtype=np.float32)
        elif name == "black and white":
            frame = np.repeat(frame @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=-1)
        elif name == "high contrast":
            frame = (frame - 110) * 1.5 + 110
        elif name in ("jpeg artifacts", BAD):
            ok, data = cv2.imencode(".jpg", np.clip(frame, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 12])
            frame = cv2.imdecode(data, cv2.IMREAD_COLOR).astype(np.float32)
        result.append(np.clip(frame, 0, 255).round().astype(np.uint8))
    return np.stack(result)


def parts(stage: dict) -> list[dict]:
    """The batches of a step of `stage`, each as a stage of its own."""
    given = stage.get("parts", [{}])
    if not given or (wrong := sorted(set().union(*given) - set(PART))):
        raise ValueError(f"train: parts must be some, of {', '.join(PART)}, got {wrong if given else given}")
    return [{**stage, **part} for part in given]


def edge(part: dict) -> int:
    """How many frames on each side of those of a clip are read too, for what `degrain` shows the decoder."""
    return int(part.get("degrain", 0.0) > 0 and (part.get("frames", 1) > 1 or part.get("drift", 0.0) > 0))


def source(folder: Path, part: dict) -> np.ndarray:
    """The pictures or clips a part of a step is cut from, "n t h w 3" uint8.

    Raises:
        ValueError: they are too short or too small for it.
    """
    array = np.load(folder / part["data"], mmap_mode="r")
    array = array if array.ndim == 5 else array[:, None]
    count, size = 1 if part.get("drift") else part.get("frames", 1) + 2 * edge(part), 4 * part["size"]
    if array.shape[1] < count or min(array.shape[2:4]) < size:
        got = f"{array.shape[1]} of {array.shape[3]}x{array.shape[2]}"
        raise ValueError(f"train: {part['data']} must have {count} frames of {size}x{size} or more a clip, got {got}")
    return array


class Batches(Dataset):
    """Batch k of a stage, a pure function of k: {hr "b 3 t 4h 4w", lr "b 3 t h w" in [-1, 1], prompt (b,) indices}.

    Clips also have what `flicker` wants of hr: flow "b 2 t-1 4h 4w" from each frame to the next (DIS), and steady
    "b 1 t-1 4h 4w", 1 where it holds. Where latents are to be propagated, lr's flows there and back are forward and
    backward "b 2 t-1 h w". With "degrain" there is what the decoder sees, seen "b 3 t h w" and beside "b 6 t h w"; one
    frame more is read on each side for it.

    The batches of step s are those from ``s * len(parts)`` on, or from ``s // again * len(parts)`` on.
    """

    def __init__(self, folder: Path, stage: dict, seed: int, name: str, rank: int = 0):
        self.stage, self.seed, self.name, self.rank = stage, seed, name, rank
        self.parts = parts(stage)
        self.sources = [source(folder, part) for part in self.parts]

    def __len__(self) -> int:
        return math.ceil(self.stage["steps"] / self.stage.get("again", 1)) * len(self.parts)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        cv2.setNumThreads(1)
        rng = np.random.default_rng(seeded(self.seed, self.name, k, self.rank, "data"))
        stage, clips = self.parts[k % len(self.parts)], self.sources[k % len(self.parts)]
        size, count = 4 * stage["size"], stage.get("frames", 1)
        drift, degrain = stage.get("drift", 0.0), stage.get("degrain", 0.0)
        before = edge(stage)
        highs, lows, prompts, views = [], [], [], []
        for _ in range(stage["batch"]):
            clip = clips[rng.integers(len(clips))]
            hr = piece(clip, count + 2 * before, size, drift, rng)
            strength = rng.uniform(0, stage.get("strength", 1.0))
            recipe = CLEAN if rng.random() < stage.get("clean", 0.0) else None
            lr = degrade(hr, rng, strength=strength, recipe=recipe)
            prompt = GOOD[rng.integers(len(GOOD))]
            if rng.random() < stage.get("looks", 0.0):
                prompt = (*LOOKS, BAD)[rng.choice(len(SHOWN), p=np.array(SHOWN) / sum(SHOWN))]
                hr = look(hr, prompt, rng)
            if rng.random() < 0.1:
                prompt = ""
            inner = slice(before, before + count)
            if degrain:
                views.append(view(lr, inner, degrain, rng))
            highs.append(hr[inner])
            lows.append(lr[inner])
            prompts.append(PROMPTS.index(prompt))
        batch = {
            "hr": torch.stack([as_tensor(hr) for hr in highs]), "lr": torch.stack([as_tensor(lr) for lr in lows]),
            "prompt": torch.tensor(prompts),
        }  # fmt: skip
        if degrain:
            batch["seen"], batch["beside"] = (torch.stack(parts) for parts in zip(*views, strict=True))
        if count > 1 and self.stage.get("as", self.name) in ("temporal", "vae_video"):
            batch["flow"], back = flows(batch["hr"])
            batch["steady"] = holds(batch["flow"], back)
            if "propagated" in self.stage:
                batch["forward"], batch["backward"] = flows(batch["lr"])
        return batch


def as_tensor(pictures: np.ndarray) -> Tensor:
    """Frames "t h w 3" uint8 as "3 t h w" in [-1, 1]."""
    return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


def piece(clip: np.ndarray, count: int, size: int, drift: float, rng: np.random.Generator) -> np.ndarray:
    """`count` frames of a clip "t h w 3", or views that move over its first one, "count size size 3", turned anyhow."""
    if drift:
        hr = moving(clip[0], count, size, drift, rng)
    else:
        first = rng.integers(clip.shape[0] - count + 1)
        y, x = (rng.integers(side - size + 1) for side in clip.shape[1:3])
        hr = clip[first : first + count, y : y + size, x : x + size]
    if rng.random() < 0.5:
        hr = hr[:, :, ::-1]
    if rng.random() < 0.5:
        hr = hr.swapaxes(1, 2)
    if rng.random() < 0.5:
        hr = hr[::-1] if count > 1 else hr[:, ::-1]
    return np.ascontiguousarray(hr)


def moving(picture: np.ndarray, count: int, size: int, drift: float, rng: np.random.Generator) -> np.ndarray:
    """`count` views "t size size 3" of a picture "h w 3", each up to `drift` pixels (to the nearest) from the last."""
    speed = rng.uniform(-drift, drift, 2)
    room = np.array(picture.shape[:2]) - size
    speed = np.clip(speed, -room / max(1, count - 1), room / max(1, count - 1))
    places = np.rint(np.arange(count)[:, None] * speed).astype(int)
    places += rng.integers(-places.min(0), room - places.max(0) + 1)
    return np.stack([picture[y : y + size, x : x + size] for y, x in places])


def view(low: np.ndarray, inner: slice, weight: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """What the decoder sees of the `inner` frames of "t h w 3" uint8: seen "3 t h w", and beside "6 t h w"."""
    lr = as_tensor(low)
    ways = list(zip(*(way[0].unbind(1) for way in flows(lr[None])), strict=True)) if len(low) > 1 else []
    seen, beside = [], []
    for n in range(len(low))[inner]:
        matches: list[Match | None] = [None, None]
        if n > 0 and rng.random() >= ALONE:
            matches[0] = (lr[:, n - 1], *ways[n - 1][::-1])
        if n < len(ways) and rng.random() >= ALONE:
            matches[1] = (lr[:, n + 1], *ways[n])
        changes, shares = neighbours(lr[:, n].contiguous(), *matches)
        seen.append(degrained(lr[:, n], changes, shares, weight))
        beside.append(changes.flatten(0, 1))
    return torch.stack(seen, 1), torch.stack(beside, 1)


def flows(clips: Tensor) -> tuple[Tensor, Tensor]:
    """DIS flows between the neighbouring frames of clips "b 3 t h w", there and back: "b 2 t-1 h w" each."""
    dis = DIS()
    pairs = [[dis(a, b) for a, b in pairwise(clip.unbind(1))] for clip in clips]
    there, back = (torch.stack([torch.stack([pair[way] for pair in row], 1) for row in pairs]) for way in (0, 1))
    return there, back


def holds(there: Tensor, back: Tensor) -> Tensor:
    """1 where the flows `there` "b 2 t h w" lead home again, else 0: "b 1 t h w"."""
    return clip(valid(frames(there), frames(back), 0.01, 0.5), there.shape[2])


def turned(batch: dict[str, Tensor], way: int) -> dict[str, Tensor]:
    """A batch mirrored from left to right (`way` & 1) and from top to bottom (2), rows and columns swapped (4)."""
    result = {}
    for name, v in batch.items():
        if v.dim() == 5:
            vector = name in ("flow", "forward", "backward")
            for bit, axis, signs in ((1, -1, (-1, 1)), (2, -2, (1, -1))):
                if way & bit:
                    v = v.flip(axis) * v.new_tensor(signs).view(2, 1, 1, 1) if vector else v.flip(axis)
            if way & 4:
                v = v.transpose(-1, -2).flip(1) if vector else v.transpose(-1, -2)
        result[name] = v
    return result


class Learner(nn.Module):
    """The networks and the losses of every stage. `forward` gives the losses of one batch, their sum as "loss"."""

    def __init__(
        self, networks: dict[str, nn.Module], schedule: Schedule, stage: dict, name: str, states: Tensor,
        basis: Tensor, low_res_schedule: Schedule | None = None,
    ):  # fmt: skip
        super().__init__()
        self.unet, self.vae, self.vae_video = (networks[key] for key in NETWORKS)
        self.schedule, self.stage, self.name = schedule, stage, name
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("alphas", schedule.alphas_cumprod.clone(), persistent=False)
        noise = (low_res_schedule or schedule).alphas_cumprod
        self.register_buffer("low_res_alphas", noise.clone(), persistent=False)
        self.diffusion = name == "unet" or (name == "temporal" and "sampler" not in stage)
        if self.diffusion and schedule.prediction_type != "v_prediction":
            raise ValueError(f"train: {name} needs a model of v_prediction, got {schedule.prediction_type}")
        self.perceptual: list[nn.Module] = []
        set_temporal(self.unet, name in ("temporal", "vae_video"))

    def trainable(self) -> dict[str, list[str]]:
        """Group -> names of the parameters this stage trains: those groups that its configuration gives a rate."""
        names = [name for name, _ in self.named_parameters()]
        only = lambda *starts: [n for n in names if n.startswith(starts)]  # noqa: E731
        plain = only("vae.decoder.", "vae.post_quant_conv.")
        video = only("vae_video.decoder.", "vae_video.post_quant_conv.")
        new = [n for n in video if "_3d." in n]
        told = [n for n in video if "time_emb_proj" in n]
        shares = only("vae_video.enlarger.class_embedding.")
        levels = [n for n in names if n.endswith("class_embedding.weight") and n not in shares]
        flat = [n for n in video if n not in (*new, *told, *levels)]
        enlarger = [n for n in only("vae_video.enlarger.") if n not in shares]
        time_ = {f"unet.{name}" for name in temporal_parameters(self.unet)}
        spatial = [n for n in only("unet.") if n not in time_ and n not in levels]
        groups = {
            "vae": {"encoder": only("vae.encoder.", "vae.quant_conv."), "decoder": flat},
            "unet": {"unet": spatial, "levels": only("unet.class_embedding.")},
            "fewstep": {"unet": spatial, "levels": levels, "decoder": flat, "told": told},
            "temporal": {
                "unet": sorted(time_), "image": spatial, "levels": levels, "decoder": flat, "new": new, "told": told,
                "enlarger": enlarger, "shares": shares,
            },
            "vae_video": {"decoder": flat, "new": new, "told": told, "enlarger": enlarger, "shares": shares},
            "vae_image": {"decoder": plain},
            "enlarger": {"enlarger": enlarger},
        }[self.name]  # fmt: skip
        return {group: names for group, names in groups.items() if group in self.stage["rates"]}

    def code(self, batch: dict[str, Tensor]) -> Tensor:
        """The latents of a batch: the linear code of a bundled model, of any other what its own encoder gives."""
        config = self.vae.config
        if config.fading:
            return encode(batch["hr"], batch["lr"], self.basis)
        return self.vae.encode(batch["hr"])[0].float() * config.scaling_factor

    def decode(self, z: Tensor, batch: dict[str, Tensor], level: Tensor) -> Tensor:
        """Decoded in chunks of three frames, as when the model is used."""
        vae = self.vae if self.name == "vae_image" else self.vae_video
        chunks = [(z / vae.config.scaling_factor).split(3, dim=2), batch.get("seen", batch["lr"]).split(3, dim=2)]
        told = batch["beside"].split(3, dim=2) if "beside" in batch else [None] * len(chunks[0])
        decoded = (vae.decode(a, b, level, beside=c) for a, b, c in zip(*chunks, told, strict=True))
        return torch.cat([part.float() for part in decoded], dim=2)

    def percept(self, result: Tensor, truth: Tensor) -> Tensor:
        """stLPIPS "b" on one random window of every frame, the mean of the stage's "nets" (alex, if it does not say);
        nothing without its weights ("stlpips": false)."""
        if not self.perceptual:
            return result.new_zeros(len(result))
        side = min(self.stage.get("window", 64), result.shape[-1])
        y, x = (int(torch.randint(length - side + 1, ())) for length in result.shape[-2:])
        cut = lambda v: v[..., y : y + side, x : x + side].transpose(1, 2).flatten(0, 1)  # noqa: E731
        result, truth, clips = cut(result), cut(truth), len(result)
        return torch.stack([net(result, truth) for net in self.perceptual]).mean(0).view(clips, -1).mean(1)

    def window(self, z: Tensor, batch: dict) -> tuple[Tensor, dict]:
        """A random part of the latents, and the batch's frames there: decoding is what costs most."""
        side = min(self.stage.get("decode", z.shape[-1]), z.shape[-1])
        y, x = (int(torch.randint(length - side + 1, ())) for length in z.shape[-2:])
        cut = lambda v, k: v[..., k * y : k * (y + side), k * x : k * (x + side)]  # noqa: E731
        large = {name: cut(batch[name], 4) for name in ("hr", "flow", "steady") if name in batch}
        small = {name: cut(batch[name], 1) for name in ("lr", "seen", "beside") if name in batch}
        return cut(z, 1), {**batch, **large, **small}

    def predict(self, x: Tensor, timestep: Tensor | int, lr: Tensor, prompt: Tensor, level: Tensor) -> Tensor:
        return self.unet(x, timestep, lr, self.states[prompt], level).float()

    def noised(self, lr: Tensor, level: Tensor) -> Tensor:
        a = self.low_res_alphas[level].view(-1, 1, 1, 1, 1)
        return a.sqrt() * lr + (1 - a).sqrt() * torch.randn_like(lr)

    def visit(self, batch: dict, sampler: Sampler, stop: int, lr: Tensor, level: Tensor, shape: Tensor) -> Tensor:
        """The state the sampler is in before step `stop`, without gradients. It starts from noise, or from none (at
        temperature 0) as often as the stage's "cold" says of each level."""
        warm = torch.rand(len(level), device=level.device) >= self.weight("cold", NONE, level)
        x = torch.randn_like(shape) * warm.view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            for i in range(stop):
                v = self.predict(x, sampler.timesteps[i], lr, batch["prompt"], level)
                x = sampler.advance(i, x, v, sampler.predict(i, x, v))
        return x

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        name = "unet" if self.diffusion else self.name
        return getattr(self, f"loss_{name}")(batch, step / self.stage["steps"])

    def loss_vae(self, batch: dict, progress: float) -> dict[str, Tensor]:
        z = self.code(batch)
        coded = (self.vae.encode(batch["hr"])[0].float() - z).square().mean()
        result = self.decode(z + torch.randn_like(z) * torch.rand(()) * 0.5, batch, self.level(len(z)))
        l1 = (result - batch["hr"]).abs().mean()
        percept = self.percept(result, batch["hr"]).mean()
        return {"loss": l1 + 0.1 * percept + 0.05 * coded, "l1": l1, "percept": percept, "coded": coded}

    def loss_vae_image(self, batch: dict, progress: float) -> dict[str, Tensor]:
        estimate, _, _, level = self.sampled(batch, grad=False)
        return self.picture(self.decode(estimate, batch, level), batch, level)

    def loss_unet(self, batch: dict, progress: float) -> dict[str, Tensor]:
        with torch.no_grad():
            z = self.code(batch)
        level = self.level(len(z))
        first = self.schedule.num_train_timesteps - 1
        t = torch.randint(first + 1, (len(z),))
        t = torch.where(torch.rand(len(z)) < self.stage.get("first", 0.0), first, t).to(z.device)
        a = self.alphas[t].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(z)
        x = a.sqrt() * z + (1 - a).sqrt() * noise
        v = self.predict(x, t, self.noised(batch["lr"], level), batch["prompt"], level)
        loss = (v - (a.sqrt() * noise - (1 - a).sqrt() * z)).square().mean()
        return {"loss": loss}

    def loss_enlarger(self, batch: dict, progress: float) -> dict[str, Tensor]:
        seen = batch.get("seen", batch["lr"])
        skip = F.interpolate(frames(seen), scale_factor=4, mode="bicubic", align_corners=False)
        result = self.vae_video.enlarger(seen, batch.get("beside"))[0].float() + clip(skip, seen.shape[2])
        l1, decibels = (result - batch["hr"]).abs().mean(), shortfall(result, batch["hr"]).mean()
        return {"loss": l1 + self.stage.get("psnr", 0.02) * decibels, "l1": l1, "psnr": 50 - decibels}

    def level(self, count: int) -> Tensor:
        """A noise level for each of `count` clips."""
        often = torch.tensor(self.stage.get("often", OFTEN), dtype=torch.float)
        places = torch.multinomial(often, count, replacement=True)
        return torch.tensor(LEVELS)[places].to(self.alphas.device)

    def sampled(self, batch: dict, grad: bool) -> tuple[Tensor, Tensor, float, Tensor]:
        """Clean estimate at a random step of the sampler; also the clean latents, the step's place, the levels."""
        with torch.no_grad():
            z = self.code(batch)
        level = self.level(len(z))
        if "sampler" not in self.stage:
            return z, z, 1.0, level
        counts, weights = self.stage["sampler"]["steps"], self.stage["sampler"]["weights"]
        count = counts[int(torch.multinomial(torch.tensor(weights, dtype=torch.float), 1))]
        sampler = Sampler(self.schedule, count, "ddim", "trailing")
        share = torch.tensor([1.0] * (count - 1) + [1.6])
        i = int(torch.multinomial(share, 1)) if grad else count - 1
        lr = self.noised(batch["lr"], level)
        x = self.visit(batch, sampler, i, lr, level, z)
        with torch.set_grad_enabled(grad):
            estimate = sampler.predict(i, x, self.predict(x, sampler.timesteps[i], lr, batch["prompt"], level))
        return estimate, z, (i + 1) / count, level

    def propagated(self, estimate: Tensor, batch: dict, level: Tensor, place: float) -> Tensor:
        """What the decoder gets of `estimate` "b c t h w": at the sampler's last step (place 1), and as often as the
        stage's "propagated" says of each level, the estimate propagated along the flow (DIS) of the low resolution."""
        if place < 1 or estimate.shape[2] == 1 or "propagated" not in self.stage:
            return estimate
        chosen = torch.rand(len(level), device=level.device) < self.weight("propagated", NONE, level)
        if not chosen.any():
            return estimate
        moved = propagate(estimate[chosen], batch["forward"][chosen], batch["backward"][chosen])
        return estimate.index_put((chosen,), moved.to(estimate))

    def picture(self, result: Tensor, batch: dict, level: Tensor, place: float = 1.0) -> dict[str, Tensor]:
        """L1 and stLPIPS weighed by the noise level. Early steps count pixels more.

        With "colours" in the stage, perception is left to brightness (`tinted`) and colours have an L1 of that weight.
        With "psnr", what a decibel of its PSNR-Y is worth at each level (PSNR loss: Chen et al. 2021, HINet).
        """
        pixels, perception = self.weight("pixels", PIXELS, level), self.weight("percept", PERCEPT, level)
        l1, colours = (result - batch["hr"]).abs().flatten(1).mean(1), 0.0
        decibels = self.weight("psnr", NONE, level) * shortfall(result, batch["hr"])
        if "colours" in self.stage:
            bright = tinted(result, batch["hr"])
            colours, result = self.stage["colours"] * (result - bright).abs().flatten(1).mean(1), bright
        percept = self.percept(result, batch["hr"])
        loss = (pixels * (l1 + colours) + decibels + place * perception * percept).mean()
        return {"loss": loss, "l1": l1.mean(), "percept": percept.mean()}

    def weight(self, name: str, usual: tuple[float, ...], level: Tensor) -> Tensor:
        """What a loss counts at each of the levels (b,), by the stage's list of that name: (b,)."""
        place = torch.searchsorted(torch.tensor(LEVELS, device=level.device), level)
        return torch.tensor(self.stage.get(name, usual), dtype=torch.float, device=level.device)[place]

    def loss_fewstep(self, batch: dict, progress: float) -> dict[str, Tensor]:
        estimate, z, place, level = self.sampled(batch, grad=True)
        part, batch = self.window(estimate, batch)
        losses = self.picture(self.decode(part, batch, level), batch, level, place)
        losses["latent"] = (estimate - z).square().mean()
        losses["loss"] = losses["loss"] + self.stage.get("latent", 0.1) * losses["latent"]
        return losses

    def loss_temporal(self, batch: dict, progress: float) -> dict[str, Tensor]:
        estimate, z, place, level = self.sampled(batch, grad=True)
        part, batch = self.window(self.propagated(estimate, batch, level, place), batch)
        losses = self.clip_losses(self.decode(part, batch, level), batch, level, place)
        losses["latent"] = (estimate - z).square().mean()
        losses["loss"] = losses["loss"] + self.stage.get("latent", 0.1) * losses["latent"]
        return losses

    def loss_vae_video(self, batch: dict, progress: float) -> dict[str, Tensor]:
        estimate, _, place, level = self.sampled(batch, grad=False)
        part, batch = self.window(self.propagated(estimate, batch, level, place), batch)
        return self.clip_losses(self.decode(part, batch, level), batch, level, place)

    def clip_losses(self, result: Tensor, batch: dict, level: Tensor, place: float) -> dict[str, Tensor]:
        """The picture losses, and what the result changes along the flow where the truth does not."""
        losses = self.picture(result, batch, level, place)
        losses["flicker"] = flicker(result, batch)
        losses["loss"] = losses["loss"] + self.weight("flicker", FLICKER, level).mean() * losses["flicker"]
        return losses


def tinted(result: Tensor, truth: Tensor) -> Tensor:
    """The brightness of `result`, the mean of its channels, with the colours of `truth`, both "b 3 t h w".

    A perceptual loss that sees only this draws no coloured fringes.
    """
    return truth + (result - truth).mean(1, keepdim=True)


def shortfall(result: Tensor, truth: Tensor) -> Tensor:
    """How many dB of PSNR, of BT.601 luma, each of "b 3 t h w" in [-1, 1] lacks to 50 dB: "b", at least 0."""
    error = (result - truth).mul(result.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(1) / 2
    return 50 + 10 * torch.log10(error.square().flatten(1).mean(1) + 1e-5)


def flicker(result: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean difference of `result` "b 3 t h w" to its next frame warped along the truth's flow, where that holds."""
    if "flow" not in batch:
        return result.sum() * 0
    flow, steady = frames(batch["flow"]), frames(batch["steady"])
    mask = steady * warp(torch.ones_like(steady), flow, "bilinear").gt(0.999)
    difference = warp(frames(result[:, :, 1:]), flow, "bilinear") - frames(result[:, :, :-1])
    return (difference.abs() * mask).mean() / mask.mean().clamp(min=1e-3)


class Average:
    """Exponential moving average of the trained parameters, slower as the run grows."""

    def __init__(self, parameters: dict[str, Tensor], decay: float):
        self.values = {name: p.detach().clone() for name, p in parameters.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [parameters[name] for name in self.values], 1 - decay)


@torch.no_grad()
def fill_levels(table: Tensor) -> None:
    """Make the rows of untrained noise levels, in place, from the trained ones around them."""
    known = LEVELS
    rows = table[list(known)].clone()
    for level in range(len(table)):
        right = next((i for i, anchor in enumerate(known) if anchor >= level), len(known) - 1)
        left = max(0, right - 1)
        gap = max(1, known[right] - known[left])
        share = min(1.0, (level - known[left]) / gap)
        table[level] = torch.lerp(rows[left], rows[right], share)


def build(config: dict) -> dict[str, nn.Module]:
    torch.manual_seed(config["seed"])
    networks = {"unet": UNetVideo(UNetConfig.from_dict(config["unet"]))}
    networks |= {key: VAE(VAEConfig.from_dict(config[key])) for key in ("vae", "vae_video")}
    with torch.no_grad():
        networks["unet"].class_embedding.weight.zero_()
        latents = networks["vae"].config.latent_channels
        networks["unet"].conv_in.weight[:, :latents] *= 0.05  # noise drowns the picture at first otherwise
        networks["unet"].conv_in.weight[:, latents:] *= 5
        for name, p in networks["vae_video"].decoder.named_parameters():
            if name.endswith(("class_embedding.weight", "time_emb_proj.bias")):
                p.zero_()
        for key in ("vae", "vae_video"):
            if networks[key].config.bicubic_skip:
                networks[key].decoder.conv_out.weight.mul_(0.05)
                networks[key].decoder.conv_out.bias.zero_()
    video = networks["vae_video"].state_dict()
    share_encoder(networks["vae"].state_dict(), video)
    networks["vae_video"].load_state_dict(video)
    return networks


def share_encoder(image: dict[str, Tensor], video: dict[str, Tensor]) -> None:
    """Put the encoder of the image VAE, the only one that is trained, into the video VAE's weights, in place."""
    for name in image:
        if name.startswith(("encoder.", "quant_conv.")):
            video[name] = image[name].clone()


def begin(
    config: dict, before: Path | None, data: Path, out: Path, main: bool, also: Iterable[tuple[str, str]] = ()
) -> tuple[dict, dict[str, nn.Module], Tensor]:
    """The configuration, the networks and the states of `PROMPTS` that a stage starts with.

    before: weights file of this script, or a model folder, which then is what the configuration says of the model.
    also: (start of names, stage): parameters that come from OUT/STAGE.pt instead of a weights file.
    """
    prompts = out / "prompts.safetensors"
    if also and (before is None or before.is_dir()):
        raise ValueError(f"train: also needs a weights file to start from, got {before}")
    if before is not None and before.is_dir():
        described, networks, text = adopt(before)
        if main:
            write_prompts(prompts, text, list(PROMPTS))
        return config | described, networks, torch.stack([text.encode(p) for p in PROMPTS])
    saved = None if before is None else torch.load(before, map_location="cpu", weights_only=True)
    if saved is not None and "folder" in saved["config"]:
        config = config | {name: saved["config"][name] for name in DESCRIBED}
    networks = build(config)
    if saved is not None:
        for start, stage in also:
            other = torch.load(out / f"{stage}.pt", map_location="cpu", weights_only=True)["weights"]
            for key, weights in saved["weights"].items():
                weights |= {n: v for n, v in other[key].items() if f"{key}.{n}".startswith(start)}
        for key, network in networks.items():
            fresh = {name: p for name, p in network.state_dict().items() if name.startswith("enlarger.")}
            network.load_state_dict(fresh | saved["weights"][key])
    states = read_prompts(prompts if "folder" in config else data / "prompts.safetensors")
    return config, networks, torch.stack([states[p] for p in PROMPTS])


def write_atomically(path: Path, content: Any) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(content, part)
    os.replace(part, path)


def rate(stage: dict, step: int) -> float:
    """Warm-up, then a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / stage.get("warmup", 100))
    return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / stage["steps"])))


def train(
    name: str, config: dict, data: Path, out: Path, *, steps: int | None = None, stop: int | None = None,
    init: Path | None = None, resume: bool = False, log_every: int = 50, save_every: int = 500, workers: int = 0,
    worker_core: int | None = None,
) -> Path:  # fmt: skip
    """Run a stage (until step `stop` if given); returns the file of its averaged weights, OUT/STAGE.pt."""
    stages = config["stages"]
    if name not in stages or stages[name].get("as", name) not in STAGES:
        raise ValueError(f"train: stage must be one of {', '.join(stages)}, got {name!r}")
    stage = {**stages[name], **({"steps": steps} if steps else {})}
    accelerator = Accelerator(mixed_precision=config.get("precision", "bf16"), cpu=not torch.cuda.is_available())
    before = init or next((out / f"{s}.pt" for s in stage.get("after", []) if (out / f"{s}.pt").exists()), None)
    out.mkdir(parents=True, exist_ok=True)
    config, networks, states = begin(config, before, data, out, accelerator.is_main_process, stage.get("also", ()))
    schedules = [Schedule.from_config(config.get(k, config["scheduler"])) for k in ("scheduler", "low_res_scheduler")]
    basis = torch.from_numpy(np.load(data / "basis.npy"))
    learner = Learner(networks, schedules[0], stage, stage.get("as", name), states, basis, schedules[1])
    groups = learner.trainable()
    learner.requires_grad_(False)
    parameters = dict(learner.named_parameters())
    trained = {n: parameters[n] for names in groups.values() for n in names}
    for p in trained.values():
        p.requires_grad_(True)
    lay_out(learner)
    speed_up(learner)
    if not learner.diffusion and config.get("stlpips") is not False:
        weights = config.get("stlpips") or data / "packages"
        learner.perceptual += [STLPIPS(weights, net).to(accelerator.device) for net in stage.get("nets", ["alex"])]
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[n] for n in names], "base": stage["rates"][g]} for g, names in groups.items()],
        lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4,
    )  # fmt: skip
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    average = Average(trained, stage.get("ema", 0.998))
    start, checkpoint = 0, out / f"{name}.state.pt"
    log: list[dict[str, Tensor]] = []  # losses of the batches that have no row in the CSV yet
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        start = saved["step"]
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(saved["trained"][n])
        average.values = {n: v.to(accelerator.device) for n, v in saved["average"].items()}
        optimizer.load_state_dict(saved["optimizer"])
        log = saved.get("log", [])
        lay_out(learner)

    def save(step: int) -> Path:
        target = out / f"{name}.pt"
        if accelerator.is_main_process:
            content = {
                "step": step, "trained": {n: p.detach() for n, p in trained.items()}, "average": average.values,
                "optimizer": optimizer.state_dict(), "log": [{k: v.cpu() for k, v in e.items()} for e in log],
            }  # fmt: skip
            write_atomically(checkpoint, content)
            weights = {k: copy.copy(n.state_dict()) for k, n in networks.items()}
            for full, value in average.values.items():
                key, _, rest = full.partition(".")
                weights[key][rest] = value.clone()
            for full in average.values:
                key, _, rest = full.partition(".")
                if rest.endswith("class_embedding.weight"):
                    fill_levels(weights[key][rest])
            if "folder" not in config:
                share_encoder(weights["vae"], weights["vae_video"])
            write_atomically(target, {"weights": weights, "stage": name, "step": step, "config": config})
        return target

    def one_core(_: int) -> None:
        torch.set_num_threads(1)
        if worker_core is not None:
            os.sched_setaffinity(0, {worker_core})
            os.nice(10)

    batches = Batches(data, stage, config["seed"], name, accelerator.process_index)
    count = len(batches.parts)
    again = stage.get("again", 1)
    order = range(start * count, (stop or stage["steps"]) * count)
    made = range(start // again * count, math.ceil((stop or stage["steps"]) / again) * count)
    loader = DataLoader(
        batches, batch_size=None, sampler=made, num_workers=workers, worker_init_fn=one_core,
        prefetch_factor=4 if workers else None, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    began = time.time()
    frozen_until = stage.get("decoder_frozen", 0.0)
    pictures = [part.get("frames", 1) == 1 for part in batches.parts]
    if "image" in groups and not pictures[-1]:
        raise ValueError(f"train: {name} trains the image model, so pictures must be its last part, got clips")
    step = start
    for k, batch in zip(order, repeated(loader, count, again, start % again, accelerator.device), strict=False):
        step, last = k // count, (k + 1) % count == 0
        torch.manual_seed(seeded(config["seed"], name, k, accelerator.process_index))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate(stage, step)
        if frozen_until and "decoder" in groups:
            for n in groups["decoder"]:
                parameters[n].requires_grad_(step >= frozen_until * stage["steps"])
        for n in groups.get("image", ()):
            parameters[n].requires_grad_(pictures[k % count])
        with nullcontext() if last else accelerator.no_sync(wrapped):
            losses = wrapped(batch, step)
            accelerator.backward(losses["loss"] / count)
        log.append({key: v.detach() for key, v in losses.items()})
        if not last:
            continue
        accelerator.clip_grad_norm_([p for p in trained.values() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(trained, step)
        saving = (step + 1) % save_every == 0
        if saving or len(log) >= log_every * count:
            finite(log, step)
        if len(log) >= log_every * count:
            row = {key: torch.stack([entry[key].cpu() for entry in log]).mean().item() for key in log[0]}
            if accelerator.is_main_process:
                record(out / f"{name}.csv", {"step": step + 1, "seconds": round(time.time() - began, 1), **row})
            log = []
        if saving:
            save(step + 1)
            if accelerator.is_main_process:
                curves(out / f"{name}.csv")
    finite(log, step)
    return save(step + 1 if len(order) else start)


def finite(log: list[dict[str, Tensor]], step: int) -> None:
    """Raise FloatingPointError if a loss of these batches, the last ones until `step`, is not finite.

    Looked at now and then, before anything is written: a GPU would have to wait for the answer at every batch.
    """
    if log and not (losses := torch.stack([entry["loss"] for entry in log])).isfinite().all():
        raise FloatingPointError(f"train: a loss before step {step + 1} is {losses.mean()}; resume at a lower rate")


def repeated(
    loader: Iterable[dict[str, Tensor]], count: int, again: int, done: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The batches of every step, on the device: `count` of them serve `again` steps, the first ones `done` less."""
    batches = iter(loader)
    while group := [{key: v.to(device) for key, v in batch.items()} for batch in islice(batches, count)]:
        for way in range(done, again):
            yield from (turned(batch, way) for batch in group)
        done = 0


def record(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(row)
        writer.writerow(f"{value:.5g}" for value in row.values())


def curves(path: Path) -> None:
    """The CSV's columns over the steps, as PATH.png; nothing before its first row."""
    if not path.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [n for n in rows[0] if n not in ("step", "seconds")] if rows else []
    figure, axes = pyplot.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3), squeeze=False)
    for axis, column in zip(axes[0], names, strict=False):
        axis.plot([float(r["step"]) for r in rows], [float(r[column]) for r in rows])
        axis.set_title(column)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"))
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one stage of a model.")
    parser.add_argument("stage", help="one of the configuration's stages")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("mini.json"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="what make_data.py wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"))
    parser.add_argument("--init", type=Path, help="start from this weights file or this model folder")
    parser.add_argument("--steps", type=int, help="length of the stage, instead of the config's")
    parser.add_argument("--resume", action="store_true", help="go on where this stage was stopped")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--worker-core", type=int, help="the core the workers run on (default: anywhere)")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    config = json.loads(args.config.read_text())
    done = train(
        args.stage, config, args.data, args.out, steps=args.steps, init=args.init, resume=args.resume,
        log_every=args.log_every, save_every=args.save_every, workers=args.workers, worker_core=args.worker_core,
    )  # fmt: skip
    print(done)


if __name__ == "__main__":
    main()
