"""The cases of every kind of parity file, and how each is run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from parity_files import Comparison, ParityFile, expect
from torch import Tensor, nn

from vsuav import checkpoint, color, flow, propagation, schedule, tiling
from vsuav.attention import relative_bucket
from vsuav.engine import Engine
from vsuav.networks import Networks
from vsuav.settings import Settings
from vsuav.shots import Shots
from vsuav.store import Store
from vsuav.text import TextEncoder
from vsuav.unet import TemporalModule, Transformer, UNetVideo
from vsuav.vae import VAE, VAEConfig

Case = tuple[str, Callable[[Comparison], None]]


def traced(network: nn.Module, stages: set[str], call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of `call`, and what the submodules `stages` returned meanwhile (of several things the first)."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        return lambda module, inputs, output: seen.update(
            {name: (output if isinstance(output, Tensor) else output[0]).clone()}
        )

    hooks = [network.get_submodule(name).register_forward_hook(hook(name)) for name in stages]
    try:
        return call(), seen
    finally:
        for handle in hooks:
            handle.remove()


def compare_call(compare: Comparison, case: str, network: nn.Module, required: set[str], call: Callable) -> Tensor:
    """Run a whole network and compare the stages recorded for the case; a trace must have the `required` ones."""
    stages = {name.removeprefix(f"{case}.") for name in compare.file.outputs(f"{case}.")}
    stages = {stage for stage in stages if "." in stage or stage in dict(network.named_children())}
    if stages or "stages" in compare.file.entry("cases", case):
        lacking = sorted(required - stages)
        expect(not lacking, f"the trace has no out.{case}.{', '.join(lacking)}")
    result, seen = traced(network, stages, call)
    for stage in sorted(stages):
        expect(stage in seen, f"{stage} was never called")
        surplus = seen[stage].ndim - compare.file.take(f"out.{case}.{stage}").ndim
        compare(f"{case}.{stage}", seen[stage].flatten(0, surplus))
    return result


def compare_block(compare: Comparison, name: str, network: nn.Module) -> None:
    """Run one submodule on a tiny input: with the embedding or the text where it takes them."""
    file = compare.file
    file.entry("eps")
    block = network.get_submodule(name)
    inputs = [file.take(f"in.eps.{name}.x")]
    if isinstance(block, TemporalModule) or getattr(block, "takes_embedding", False):
        inputs.append(file.take("in.eps.emb"))
    elif isinstance(block, Transformer):
        inputs.append(file.take("in.eps.ctx"))
    compare(f"eps.{name}", block(*inputs), noise=True)


def has_size(tensor: Tensor, entry: dict) -> None:
    """The input of a case must be as large as the case says ("b c t h w")."""
    for key, axis in {"B": 0, "T": -3, "h": -2, "w": -1}.items():
        if key in entry:
            expect(tensor.shape[axis] == entry[key], f"{key} is {tensor.shape[axis]}, the case says {entry[key]}")


def unet(file: ParityFile) -> Iterator[Case]:
    """Whole calls, single blocks, and the table of relative positions."""

    def required(network: UNetVideo, case: str) -> set[str]:
        """Every block, and all parts of the transformers and temporal modules that any part is recorded of."""
        stages = {"conv_in", "time_embedding", "class_embedding"}
        for name, blocks in network.named_children():
            stages |= {f"{name}.{i}" for i, _ in blocks.named_children()} if "blocks" in name else set()
            stages |= {name} if name.startswith("mid_") else set()
        recorded = {name.removeprefix(f"{case}.") for name in file.outputs(f"{case}.")}
        inner = {name.rpartition(".transformer_blocks.")[0] for name in recorded if ".transformer_blocks." in name}
        for name in inner or {"down_blocks.*.attentions.*"}:
            parts = ("attn1", "attn2", "attn_temporal", "ff")
            stages |= {name, name.replace("attentions", "resnets"), f"{name}.resblock_temporal"}
            stages |= {f"{name}.transformer_blocks.0.{part}" for part in parts}
        inner = {name.rpartition(".resblocks_3d")[0] for name in recorded if ".resblocks_3d" in name}
        for name in inner or {"down_temp_blocks.*"}:
            stages |= {f"{name}.resblocks_3d_temporal", f"{name}.resblocks_3d_spatial"}
        return stages

    def call(compare: Comparison, case: str) -> None:
        network, entry = file.folder.network("unet"), file.entry("cases", case)
        names = ("sample", "timestep", "low_res", "encoder_hidden_states", "class_labels")
        inputs = [file.take(f"in.{case}.{name}") for name in names]
        has_size(inputs[0], entry)
        stages = required(network, case)
        compare(f"{case}.sample", compare_call(compare, case, network, stages, lambda: network(*inputs)), noise=True)

    def buckets(compare: Comparison, name: str) -> None:
        file.entry("rel_pos_bucket")
        compare(name, relative_bucket(int(name.rpartition(".T")[2])), exact=True)

    for case in file.cases:
        yield case, lambda compare, case=case: call(compare, case)
    for name in file.outputs("eps."):
        block = name.removeprefix("eps.")
        yield name, lambda compare, block=block: compare_block(compare, block, file.folder.network("unet"))
    for name in file.outputs("rel_pos_bucket.") or ["rel_pos_bucket.T*"]:
        yield name, lambda compare, name=name: buckets(compare, name)


def vae(file: ParityFile) -> Iterator[Case]:
    """Decoding and encoding, whole and traced, and single blocks."""

    def call(compare: Comparison, case: str) -> None:
        network, entry = file.folder.network(file.name), file.entry("cases", case)
        if f"in.{case}.x" in file.tensors:
            x = file.take(f"in.{case}.x")
            has_size(x, entry)
            for name, result in zip(("mean", "logvar"), network.encode(x), strict=True):
                compare(f"{case}.{name}", result, noise=True)
            return
        z, low_res = file.take(f"in.{case}.z"), file.take(f"in.{case}.img")
        has_size(z, entry)
        stages = {"conv_in", "mid_block", "mid_block.resnets.0", "mid_block.attentions.0"}
        stages |= {f"up_blocks.{i}" for i in range(len(network.decoder.up_blocks))}
        if network.config.condition_img:
            stages |= {"condition_in", "condition_in.0", "condition_fuse"}
        stages = {f"decoder.{name}" for name in stages}
        decode = compare_call(
            compare, case, network, stages, lambda: network.decode(z, low_res, w=entry.get("w_lr", 1.0))
        )
        compare(f"{case}.x", decode, noise=True)

    for case in file.cases:
        yield case, lambda compare, case=case: call(compare, case)
    for name in file.outputs("eps."):
        block = name.removeprefix("eps.")
        yield name, lambda compare, block=block: compare_block(compare, block, file.folder.network(file.name))


def propagate(file: ParityFile) -> Iterator[Case]:
    """Whole propagations, plain warps, and validity masks."""

    def whole(compare: Comparison, case: str) -> None:
        entry = file.entry("cases", case)
        x = file.take("in.x")
        prefix = f"in.{case.removeprefix('resized.')}.flow" if "flow_size" in entry else "in.flow"
        forward, backward = file.take(f"{prefix}_fw"), file.take(f"{prefix}_bw")
        if "flow_size" in entry:
            has_size(forward, dict(zip("hw", entry["flow_size"], strict=True)))
            resized = flow.resize_flow(forward.transpose(1, 2).flatten(0, 1), *x.shape[-2:])
            resized = resized.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
            compare(f"{case}.flow_fw", resized)
        options = {key: entry[key] for key in ("mode", "interpolation", "alpha1", "alpha2", "fuse_scale")}
        compare(case, propagation.propagate(x, forward, backward, **options), noise=True)

    def warp(compare: Comparison, name: str) -> None:
        x, forward = file.take("in.x"), file.take("in.flow_fw")
        compare(name, flow.warp(x[:, :, 1], forward[:, :, 0], name.removeprefix("warp.")), noise=True)

    def mask(compare: Comparison, kind: str) -> None:
        entry = next((entry for name, entry in file.cases.items() if name.endswith(f".{kind}")), None)
        expect(entry is not None, f"no case ends in .{kind}, whose alpha1 and alpha2 are needed")
        flows = file.take("in.flow_fw"), file.take("in.flow_bw")
        for name, (there, back) in (("mask_fw", flows), ("mask_bw", flows[::-1])):
            pairs = zip(there.unbind(2), back.unbind(2), strict=True)
            masks = [flow.valid(*pair, entry["alpha1"], entry["alpha2"]) for pair in pairs]
            compare(f"{name}.{kind}", torch.stack(masks, 2), exact=True)

    for case in file.cases:
        yield case, lambda compare, case=case: whole(compare, case)
    for name in file.outputs("warp."):
        yield name, lambda compare, name=name: warp(compare, name)
    for kind in sorted({name.partition(".")[2] for name in file.outputs("mask_")}):
        yield f"mask.{kind}", lambda compare, kind=kind: mask(compare, kind)


def schedules(file: ParityFile) -> Iterator[Case]:
    """Tables of the noise, time steps, single steps of the sampler, and the noise on the conditioning frames."""

    def sampler(steps: int) -> schedule.Sampler:
        return schedule.Sampler(schedule.Schedule.from_config(file.entry("ddim_config")), steps)

    def step(compare: Comparison, case: str, *, edited: bool) -> None:
        entry = file.entry("cases", case)
        ddim, i = sampler(entry["num_inference_steps"]), entry["step_index"]
        expect(ddim.timesteps[i] == entry["timestep"], f"{case} is at {ddim.timesteps[i]}, not {entry['timestep']}")
        x, v, delta = (file.take(f"in.{name}") for name in ("sample", "v", "x0_delta"))
        clean = ddim.predict(i, x, v)
        if edited:
            compare(f"{case}.prev", ddim.advance(i, x, v, clean + delta))
            compare(f"{case}.plain_prev", ddim.advance(i, x, v, clean))
        else:
            compare(f"{case}.x0", clean)

    def steps_with_edits(compare: Comparison) -> None:
        file.entry("cases", "prev")
        for case in cases:
            step(compare, case, edited=True)

    def table(compare: Comparison, name: str) -> None:
        config = file.entry(f"{name.partition('.')[0]}_config")
        compare(name, schedule.Schedule.from_config(config).alphas_cumprod)

    def timesteps(compare: Comparison, name: str) -> None:
        compare(name, torch.tensor(sampler(int(name.rpartition(".")[2])).timesteps), exact=True)

    def add_noise(compare: Comparison, name: str) -> None:
        low_res = schedule.Schedule.from_config(file.entry("low_res_config"))
        image, noise = file.take("in.image"), file.take("in.noise")
        compare(name, schedule.add_noise(low_res, image, noise, int(name.rpartition(".")[2])))

    cases = [case for case, entry in file.cases.items() if isinstance(entry, dict)]
    for case in cases:
        yield case, lambda compare, case=case: step(compare, case, edited=False)
    yield "prev", steps_with_edits
    for name in ("ddim.alphas_cumprod", "low_res.alphas_cumprod"):
        yield name, lambda compare, name=name: table(compare, name)
    counts = {str(file.cases[case].get("num_inference_steps")) for case in cases}
    for name in sorted({f"timesteps.{count}" for count in counts} | set(file.outputs("timesteps."))):
        yield name, lambda compare, name=name: timesteps(compare, name)
    for name in file.outputs("add_noise.") or ["add_noise.*"]:
        yield name, lambda compare, name=name: add_noise(compare, name)


def colors(file: ParityFile) -> Iterator[Case]:
    """Colour corrections of several clips, and the truncation to 8 bits."""

    def correct(compare: Comparison, clip: str) -> None:
        content, low_res = file.take(f"in.{clip}.content"), file.take(f"in.{clip}.lr")
        style = color.bicubic(low_res, 4)
        compare(f"{clip}.style", style, noise=True)
        compare(f"{clip}.adain", color.adain(content, style), noise=True)
        compare(f"{clip}.wavelet", color.wavelet(content, style), noise=True)

    def truncate(compare: Comparison) -> None:
        """Of the recorded frames: truncating ours would turn a last bit into a whole level."""
        file.entry("cases", "uint8")
        for clip in clips:
            frames = file.take(f"out.{clip}.wavelet")
            compare(f"{clip}.wavelet_uint8", ((frames / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8), exact=True)

    clips = sorted({name.split(".")[1] for name in file.tensors if name.startswith("in.")})
    clips = sorted({*clips, *(name.split(".")[0] for name in file.outputs(""))})
    for clip in clips:
        yield clip, lambda compare, clip=clip: correct(compare, clip)
    yield "uint8", truncate


def raft(file: ParityFile) -> Iterator[Case]:
    """A pair of frames, with what the network did on the way, and a clip whose size is no multiple of 8."""

    def direct(compare: Comparison, case: str) -> None:
        entry, network = file.entry("cases", case), file.folder.network("raft")
        first, second = file.take(f"in.{case}.image1"), file.take(f"in.{case}.image2")
        has_size(first, entry)
        forward, backward = flow.RAFT(network, entry["iters"])(first[0], second[0])
        compare(f"{case}.flow_fw", forward[None], noise=True)
        compare(f"{case}.flow_bw", backward[None], noise=True)
        deltas: list[Tensor] = []
        handle = network.update_block.register_forward_hook(lambda module, inputs, output: deltas.append(output[1]))
        refined = network(first, second, num_flow_updates=entry["iters"])
        handle.remove()
        compare(f"{case}.flow_fw.iter1", refined[0])
        compare(f"{case}.flow_fw_eighth", sum(deltas))

    def clip(compare: Comparison, case: str) -> None:
        entry, network = file.entry("cases", case), file.folder.network("raft")
        frames = file.take(f"in.{case}.frames")
        has_size(frames, entry)
        larger = [-(-side // 8) * 8 for side in frames.shape[-2:]]
        ratio = torch.tensor([frames.shape[-1] / larger[1], frames.shape[-2] / larger[0]]).view(2, 1, 1, 1)
        for suffix, slip in (("", True), ("_noslip", False)):
            estimate = flow.RAFT(network, entry["iters"], slip=slip)
            pairs = zip(frames[0].unbind(1)[:-1], frames[0].unbind(1)[1:], strict=True)
            both = [torch.stack(flows, 1) for flows in zip(*(estimate(*pair) for pair in pairs), strict=True)]
            for name, flows in zip(("flow_fw", "flow_bw"), both, strict=True):
                # the reference without the slip leaves vectors in the pixels of the enlarged frame
                compare(f"{case}.{name}{suffix}", (flows if slip else flows / ratio)[None])

    for case in file.cases:
        run = clip if f"in.{case}.frames" in file.tensors else direct
        yield case, lambda compare, case=case, run=run: run(compare, case)


UNUSED = VAE(VAEConfig(block_out_channels=(8,), norm_num_groups=2, mid_block_add_attention=False))
"""The engine wants a decoder; these cases end with latents."""


class GivenNetworks(Networks):
    """The engine's networks with the noise and the flows of a parity case."""

    def __init__(self, models: checkpoint.Models, settings: Settings, given: dict[str, Tensor]):
        super().__init__(models, settings)
        self.given = given

    def noise(self, stream: str, frame: int, shape: tuple[int, ...]) -> Tensor:
        return self.given[stream][0, :, frame]

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        frames = self.given["image"][0].unbind(1)
        n = next(n for n, frame in enumerate(frames) if torch.equal(frame, first))
        expect(torch.equal(frames[n + 1], second), f"the engine wants the flow of frame {n} to one not next to it")
        return torch.cat([self.given["forward"][0, :, n], self.given["backward"][0, :, n]])


def pipeline(file: ParityFile) -> Iterator[Case]:
    """Whole runs by the engine."""

    def run(compare: Comparison, case: str) -> None:
        entry, folder = file.entry("cases", case), file.folder
        names = {"image": "image", "lr": "lr_noise", "latent": "latents"}
        if entry["propagation_steps"]:
            names |= {"forward": "flow_fw", "backward": "flow_bw"}
        given = {key: file.take(f"in.{case}.{name}") for key, name in names.items()}
        has_size(given["image"], entry)
        length = entry["T"]
        negative, positive = file.take("in.prompt_embeds")
        models = checkpoint.Models(
            kind="uav", path=Path(), raft=None, defaults={}, presets={}, digest="", video_vae=None, vae=UNUSED,
            unet=folder.network("unet"), text=TextEncoder(stored={"negative": negative, "positive": positive}),
            schedule=schedule.Schedule.from_config(file.entry("ddim_config")),
            low_res_schedule=schedule.Schedule.from_config(file.entry("low_res_config")),
        )  # fmt: skip
        settings = Settings(
            prompts=((0, "positive"),), negative_prompt="negative", steps=entry["steps"], video_vae=False,
            guidance_scale=entry["guidance"], noise_level=entry["noise_level"],
            propagation_steps=tuple(entry["propagation_steps"]), propagation_radius=length,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        sources = dict(enumerate(given["image"][0].unbind(1)))
        store, shots = Store(1 << 40), Shots(length, prompt_at=settings.prompt_at)
        engine = Engine(GivenNetworks(models, settings, given), store)
        latents = torch.stack(engine.latents(range(length), shots, sources), 1)[None]
        compare(f"{case}.latents", latents, noise=True)

        def stored(*key: object) -> Tensor:
            value = store.get(key)
            expect(value is not None, f"the engine never made {key}")
            return value

        def guided(step: int, n: int) -> Tensor:
            spans = tiling.windows_of(n, 0, length)
            return tiling.merge([stored("v", step, *span)[n - span[0]] for span in spans])

        traces = {
            "v_guided": guided,
            "x0_before_prop": lambda step, n: stored("x0", step, n),
            "x0_after_prop": lambda step, n: stored("clean", step, n),
            "latents_after_step": lambda step, n: stored("latent", step + 1, n),
        }
        for name in file.outputs(f"{case}."):
            kind, _, which = name.removeprefix(f"{case}.").partition(".")
            if kind in traces:
                values = [traces[kind](int(which), n) for n in range(length)]
                compare(name, torch.stack(values, 1)[None], noise=True)
            elif kind == "frames":
                models.vae = folder.network(f"vae-{which}")
                decoder = Engine(GivenNetworks(models, settings, given), store)
                frames = {}
                for block in range(tiling.block_of(length - 1) + 1):
                    frames |= decoder.run(block, shots, sources)
                picked = torch.stack([frames[n] for n in entry["frames"]], 1)[None]
                compare(name, picked * 2 - 1, noise=True)
        decoded = any(name.startswith(f"{case}.frames.") for name in file.outputs(""))
        expect(decoded or entry["frames"] is None, f"no out.{case}.frames.*, but the case lists frames")

    for case in file.cases:
        yield case, lambda compare, case=case: run(compare, case)


KINDS = {
    "unet": unet, "vae-3d": vae, "vae-video": vae, "propagation": propagate, "scheduler": schedules, "color": colors,
    "raft": raft, "pipeline": pipeline,
}  # fmt: skip
