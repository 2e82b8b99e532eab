#!/usr/bin/env python
"""Measure vsuav on this machine's CPU: networks, what surrounds them, whole clips, memory; a JSON file and tables.

    python scripts/bench.py                                 everything, about fifteen minutes on two cores
    python scripts/bench.py --quick                         the same in a minute or two, at small sizes
    python scripts/bench.py --law                           also how far bfloat16 and tiles move the result, and what
                                                            presets, solvers and guidance cost in quality
    python scripts/bench.py --markdown docs/speed.md        also write the tables into a page
        [--only SECTION,…] [--size WxH …] [--threads N] [--model FOLDER]
        [--repeat N] [--budget SECONDS] [--json FILE]
        [--packages FOLDER]

What is compared is measured in turns in one run, and the least and the median are given. A network's flops are those
of its plain version (scripts/plain.py); its share of the roofline is the time of its products, each alone at the best
rate seen here in any layout (scripts/bench_networks.py), over its own time. Without models/mini, weights are random.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from bench_clips import before, overhead, parts, peak, whole
from bench_networks import Call, Roofline, Timing, largest, products, race
from bench_quality import differences, quality
from export import export
from plain import PlainDecoder, PlainUNet
from safetensors.torch import save_file

from vsuav import native
from vsuav.checkpoint import load
from vsuav.folders import bundled
from vsuav.layers import lay_out
from vsuav.networks import TORCH_DTYPES, auto_dtype, choose
from vsuav.tiling import CHUNK, WINDOW
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE, VAEConfig

HERE = Path(__file__).resolve().parent
FULL_HD = (480, 270)
RELEASED_DECODER = VAEConfig(up_block_types=("UpDecoderBlock3D_plus",) * 3, condition_img=True)
DTYPES = {name: TORCH_DTYPES[name] for name in dict.fromkeys(("float32", auto_dtype("auto", "cpu")))}
"""What networks are measured in: bfloat16 only where the CPU multiplies in it."""
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

TABLES = {
    "networks": (
        "Networks",
        {"network": "{network}", "input": "{input}", "arithmetic": "{arithmetic}", "ms": "{ms:.1f}",
         "median": "{ms_median:.1f}", "GFLOP": "{gflop:.1f}", "GFLOP/s": "{gflops:.0f}", "of roofline": "{share:.0%}",
         "times plain": "{times_plain:.2f}", "by medians": "{times_plain_median:.2f}"},
    ),
    "parts": (
        "Around the networks",
        {"what": "{what}", "input": "{input}", "ms": "{ms:.3f}", "median": "{ms_median:.3f}"},
    ),
    "clips": (
        "Clips",
        {"what": "{what}", "input": "{input}", "ms a frame": "{ms:.2f}", "median": "{ms_median:.2f}",
         "frames/s": "{rate:.2f}", "compared": "{compared}"},
    ),
    "memory": ("Memory", {"what": "{what}", "input": "{input}", "MiB": "{mib:.0f}"}),
    "quality": (
        "What speed costs",
        {"what": "{what}", "U-Net calls a window": "{calls}", "outer ring only": "{rings}",
         "ms a frame": "{ms:.1f}", "PSNR-Y": "{psnr_y:.2f}",
         "stLPIPS-vgg": "{stlpips:.4f}", "E_warp": "{flicker:.3f}", "PSNR to 4 steps": "{few:.1f}",
         "to many steps": "{many:.1f}"},
    ),
    "law": ("How results differ", {"what": "{what}", "value": "{value:.3f}"}),
}  # fmt: skip
"""Section of the results -> its title, and its columns: how they are made from a row of the JSON file."""
SECTIONS = ("bundled", "released", "parts", "clips", "memory")
ALSO = ("law", "quality")


class Bench:
    """One run: its options, the roofline it shares, the model."""

    def __init__(self, options: argparse.Namespace, model: Path):
        self.options, self.model = options, model
        self.roofline = Roofline(0.002 if options.quick else 0.05)
        self.race = partial(race, repeat=options.repeat, budget=options.budget)

    def network(self, name: str, size: str, calls: dict[str, Call], plain: Call, sketch: Call) -> Iterator[dict]:
        """Rows of one network: ours by dtype, and the plain one, which `sketch` runs on meta tensors."""
        counted = products(sketch)
        gflop = sum(count * product.flops for product, count in counted.items()) / 1e9
        infer = {name: torch.inference_mode()(call) for name, call in {**calls, "plain": plain}.items()}
        times = self.race(infer)
        for arithmetic, taken in times.items():
            dtype = DTYPES.get(arithmetic, torch.float32)
            yield {
                "network": name, "input": size, "arithmetic": arithmetic.replace("plain", "plain float32"),
                "ms": 1e3 * taken.least, "ms_median": 1e3 * taken.median, "gflop": gflop,
                "gflops": gflop / taken.least, "share": self.roofline.seconds(counted, dtype) / taken.least,
                "times_plain": times["plain"].least / taken.least,
                "times_plain_median": times["plain"].median / taken.median,
                "products": self.roofline.list(counted) if arithmetic == "plain" else [],
            }  # fmt: skip

    def unet(self, name: str, unets: dict[str, UNetVideo], plain: PlainUNet, tokens: int, width: int, height: int):
        """Rows of a U-Net on one window; the text's keys and values are computed beforehand, as the engine does."""
        config = plain.config
        low_res = torch.randn(1, 3, WINDOW, height, width)
        sample = torch.randn(1, config.out_channels, WINDOW, height, width)
        text, calls = torch.randn(1, tokens, config.cross_attention_dim), {}
        for arithmetic, unet in unets.items():
            x, low = sample.to(DTYPES[arithmetic]), low_res.to(DTYPES[arithmetic])
            calls[arithmetic] = partial(unet, x, 500, low, unet.prepare(text), 20)
        inputs = [sample, torch.tensor([500]), low_res, text, torch.tensor([20])]
        sketch = PlainUNet(config, on_meta(plain.state))
        return self.network(
            f"{name} U-Net, {WINDOW} frames", f"{width}x{height}", calls, partial(plain, *inputs),
            partial(sketch, *(x.to("meta") for x in inputs)),
        )  # fmt: skip

    def decoder(self, name: str, vaes: dict[str, VAE], plain: PlainDecoder, width: int, height: int):
        """Rows of a decoder on one chunk."""
        z = torch.randn(1, plain.config.latent_channels, CHUNK, height, width)
        low_res = torch.rand(1, 3, CHUNK, height, width) * 2 - 1
        inputs = [z, low_res, torch.tensor([20])]
        calls = {k: partial(vae.decode, z.to(DTYPES[k]), *inputs[1:]) for k, vae in vaes.items()}
        sketch = PlainDecoder(plain.config, on_meta(plain.state))
        return self.network(
            f"{name} decoder, {CHUNK} frames", f"{width}x{height}", calls, partial(plain, *inputs),
            partial(sketch, *(x.to("meta") for x in inputs)),
        )  # fmt: skip

    def bundled(self) -> Iterator[dict]:
        models = {arithmetic: load(self.model, dtype) for arithmetic, dtype in DTYPES.items()}
        first = models["float32"]
        tokens = len(first.text.encode(first.defaults["prompt"]))
        unet = PlainUNet(first.unet.config, first.unet.state_dict())
        kinds = {"video": "video_vae", "image": "vae"}
        decoders = {kind: getattr(first, part) for kind, part in kinds.items() if getattr(first, part)}
        plain = {kind: PlainDecoder(vae.config, vae.state_dict()) for kind, vae in decoders.items()}
        unets = {k: lay_out(m.unet) for k, m in models.items()}
        for size in self.options.size:
            yield from self.unet("bundled", unets, unet, tokens, *size)
            for kind in decoders:
                vaes = {k: lay_out(getattr(m, kinds[kind])) for k, m in models.items()}
                yield from self.decoder(f"bundled {kind}", vaes, plain[kind], *size)

    def released(self) -> Iterator[dict]:
        unet = UNetVideo(UNetConfig()).requires_grad_(False)
        plain = PlainUNet(unet.config, unet.state_dict())
        side = 16 if self.options.quick else 64
        yield from self.unet("released", by_dtype(unet), plain, 77, side, side)
        del unet, plain
        vae = VAE(RELEASED_DECODER).requires_grad_(False)
        side = 8 if self.options.quick else 32
        plain = PlainDecoder(vae.config, vae.state_dict())
        yield from self.decoder("released video", by_dtype(vae), plain, side, side)

    def parts(self) -> Iterator[dict]:
        for size in self.options.size:
            for what, call in parts(size, self.settings(size)).items():
                taken = race({what: call}, 30, 0.2 if self.options.quick else 1.0)[what]
                yield {"what": what, "input": "{}x{}".format(*size), **milliseconds(taken)}

    def clips(self) -> Iterator[dict]:
        options, usual = self.options, auto_dtype("auto", "cpu")
        longest = 12 if options.quick else 48
        for size in options.size:
            settings = self.settings(size)
            alone = replace(settings, propagation_steps=())
            bare = overhead(size, settings, 2 * longest, options.repeat, options.budget)
            flat = overhead(size, alone, 2 * longest, options.repeat, options.budget)
            length = min(longest, max(18, longest * 160 * 120 // (size[0] * size[1])))  # larger frames, fewer of them
            dtypes = list(dict.fromkeys((usual, "float32")))
            real = whole(self.model, size, dtypes, options.threads, length, options.repeat, options.budget)
            for rows, how in ((bare, "no network"), (flat, "no network nor propagation")):
                for what, taken in rows.items():
                    compared = f"{taken.least / real[usual].least:.2%} of the model in {usual}"
                    if what.startswith("plugin"):
                        resize = rows[what.replace("plugin", "resize.Bicubic")]
                        compared += f", {taken.least / resize.least:.2f} x resize.Bicubic"
                    if "resize" not in what or rows is bare:
                        yield self.clip(what if "resize" in what else f"{what}, {how}", size, taken, compared)
            for dtype, taken in real.items():
                yield self.clip(f"upscale, default preset, {dtype}", size, taken, "")
            if size == options.size[0]:
                plain = before(self.model, size, options.threads, 6)
                compared = f"{plain.least / real[usual].least:.2f} x {usual}"
                yield self.clip("engine, networks the plain way, float32", size, plain, compared)

    def clip(self, what: str, size: tuple[int, int], taken: Timing, compared: str) -> dict:
        rate = 1 / taken.least
        row = {"what": what, "input": "{}x{}".format(*size), **milliseconds(taken)}
        return {**row, "rate": rate, "compared": compared}

    def memory(self) -> Iterator[dict]:
        usual, length = auto_dtype("auto", "cpu"), 9
        for size in self.options.size if self.options.quick else [*self.options.size, FULL_HD]:
            used = peak(self.model, size, usual, self.options.threads, length)
            shape = "{}x{}".format(*size)
            yield {"what": f"process, upscale, {usual}", "input": shape, "mib": used["peak"] / 2**20}
            yield {"what": "  of it before the call", "input": shape, "mib": used["before"] / 2**20}
        models = load(self.model)
        for name, unet, vae, dtype in (
            ("bundled", models.unet.config, models.video_vae.config if models.video_vae else None, torch.float16),
            ("released", UNetConfig(), RELEASED_DECODER, torch.float16),
        ):
            for what, needed in predicted(unet, vae, dtype, *FULL_HD):
                yield {"what": f"GPU, predicted, {name}, {what}", "input": "{}x{}".format(*FULL_HD),
                       "mib": needed / 2**20}  # fmt: skip

    def law(self) -> Iterator[dict]:
        options = self.options
        length = 6 if options.quick else 12
        for what, value in differences(self.model, options.threads, length, options.packages):
            yield {"what": what, "value": value}

    def quality(self) -> Iterator[dict]:
        options = self.options
        length, most = (6, 6) if options.quick else (24, 30)
        yield from quality(self.model, options.threads, length, most, options.packages)

    def settings(self, size: tuple[int, int]):
        return choose({"model": self.model, "threads": self.options.threads, "device": "cpu"}, *size)[1]


def predicted(unet: UNetConfig, vae: VAEConfig | None, dtype: torch.dtype, width: int, height: int) -> Iterator[tuple]:
    """What weights and activations take on a GPU: a guided window in `dtype`, a chunk decoded in float32."""
    with torch.device("meta"):
        network = UNetVideo(unet).to("meta", dtype)
        network.embed = lambda *_: torch.empty(1, 4 * unet.block_out_channels[0], dtype=dtype)  # it checks values
        text = network.prepare(torch.empty(2, 77, unet.cross_attention_dim))
        x, low = (torch.empty(2, c, WINDOW, height, width, dtype=dtype) for c in (unet.out_channels, 3))
        yield "U-Net weights", sum(p.nbytes for p in network.parameters())
        yield "U-Net activations, guided", largest(lambda: network(x, 0, low, text, 0))
        if vae is not None:
            decoder = VAE(vae)
            z, low = (torch.empty(1, c, CHUNK, height, width) for c in (vae.latent_channels, 3))
            yield "VAE weights, float32", sum(p.nbytes for p in decoder.parameters())
            yield "VAE activations, float32", largest(lambda: decoder.decode(z, low, torch.zeros(1, dtype=torch.long)))


def by_dtype[M: torch.nn.Module](network: M) -> dict[str, M]:
    copies = {arithmetic: copy.deepcopy(network).to(dtype) for arithmetic, dtype in list(DTYPES.items())[1:]}
    return {arithmetic: lay_out(each) for arithmetic, each in {"float32": network, **copies}.items()}


def on_meta(state: dict) -> dict:
    return {name: tensor.to("meta") for name, tensor in state.items()}


def milliseconds(taken: Timing) -> dict[str, float]:
    return {"ms": 1e3 * taken.least, "ms_median": 1e3 * taken.median}


def random_model(folder: Path) -> Path:
    """The bundled model's configuration with random weights, as a model folder."""
    config = json.loads((HERE / "mini.json").read_text())
    torch.manual_seed(0)
    networks = {"unet": UNetVideo(UNetConfig.from_dict(config["unet"]))}
    networks |= {name: VAE(VAEConfig.from_dict(config[name])) for name in ("vae", "vae_video")}
    weights = {name: network.state_dict() for name, network in networks.items()}
    torch.save({"config": config, "weights": weights}, folder / "weights.pt")
    prompts = [config["model"]["defaults"][name] for name in ("prompt", "negative_prompt")]
    states = {str(i): torch.randn(32, config["unet"]["cross_attention_dim"]) for i in range(2)}
    save_file(states, folder / "prompts.safetensors", metadata={"prompts": json.dumps(prompts)})
    export(folder / "weights.pt", folder / "model", folder / "prompts.safetensors")
    return folder / "model"


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(threads: int, model: Path | None) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists() and (found := re.search(r"^model name\s*: (.*)$", known.read_text(), re.MULTILINE)):
        cpu = found[1]
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "threads": threads, "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(), "bfloat16": auto_dtype("auto", "cpu") == "bfloat16",
        "native": native.KIND, "load": os.getloadavg()[0], "weights": "trained" if model else "random",
    }  # fmt: skip


def cells(section: str, rows: list[dict]) -> list[list[str]]:
    columns = TABLES[section][1]
    return [list(columns), *([form.format(**row) for form in columns.values()] for row in rows)]


def plain_table(section: str, rows: list[dict]) -> str:
    table = cells(section, rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([TABLES[section][0], *lines, ""])


def markdown(results: dict) -> str:
    """All tables, and the machine."""
    about = results["machine"]
    cores = "core" if about["cores"] == 1 else "cores"
    said = [
        f"Machine: {about['cpu']}, {about['cores']} {cores}, {about['threads']} threads, {about['capability']}, "
        f"{'with' if about['native'] else 'without'} machine code of vsuav's own; "
        f"torch {about['torch']}; {about['weights']} weights."
    ]
    for section, rows in results["tables"].items():
        first, *others = cells(section, rows)
        table = [first, ["---"] * len(first), *others]
        lines = [f"| {' | '.join(cell.strip() for cell in row)} |" for row in table]
        said.append("\n".join([f"### {TABLES[section][0]}", "", *lines]))
    return "\n\n".join(said)


def fill(page: str, tables: str) -> str:
    """A page with what lies between its two marks replaced."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"bench: the page must have the lines {BEGIN} and {END}, once each and in this order")
    return page[: page.index(BEGIN)] + f"{BEGIN}\n\n{tables}\n\n" + page[page.index(END) :]


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    parser.add_argument("--law", action="store_true", help="also the sections law and quality")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)} (all); {', '.join(ALSO)}")
    parser.add_argument("--size", action="append", metavar="WxH", help="input size; default: 160x120 and 320x240")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--repeat", type=int, help="rounds after the first (default 10, quick 2)")
    parser.add_argument("--budget", type=float, help="seconds after which a comparison ends (default 25, quick 5)")
    parser.add_argument(
        "--packages", type=Path, default=Path("data/packages"), help="where stLPIPS's wheel lies, if at all"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="default: build/bench.json")
    parser.add_argument("--markdown", type=Path, help="page to write the tables into, between its two marks")
    options = parser.parse_args(given)
    options.only = [name for name in options.only.split(",") if name]
    if unknown := set(options.only) - {*SECTIONS, *ALSO}:
        parser.error(f"--only: unknown section {', '.join(sorted(unknown))}; known: {', '.join((*SECTIONS, *ALSO))}")
    sizes = options.size or (["48x32"] if options.quick else ["160x120", "320x240"])
    if bad := [size for size in sizes if not re.fullmatch(r"\d+x\d+", size)]:
        parser.error(f"--size must look like 160x120, got {bad[0]}")
    options.size = [tuple(map(int, size.split("x"))) for size in sizes]
    options.repeat = options.repeat or (2 if options.quick else 10)
    options.budget = options.budget or (5.0 if options.quick else 25.0)
    if options.markdown:
        fill(options.markdown.read_text(), "")
    return options


def main(given: list[str] | None = None) -> dict:
    options = arguments(given)
    with tempfile.TemporaryDirectory() as temporary, torch_threads(options.threads):
        trained = options.model or bundled()
        bench = Bench(options, trained or random_model(Path(temporary)))
        results = {"machine": machine(options.threads, trained), "tables": {}}
        for section in [*options.only, *(name for name in ALSO if options.law and name not in options.only)]:
            rows = list(getattr(bench, section)())
            table = "networks" if section in ("bundled", "released") else section
            results["tables"].setdefault(table, []).extend(rows)
            print(plain_table(table, rows), flush=True)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n")
            if options.markdown:
                options.markdown.write_text(fill(options.markdown.read_text(), markdown(results)))
    return results


if __name__ == "__main__":
    main()
