#!/usr/bin/env python
"""Measure vsuav on a CUDA GPU: networks, whole clips, memory against what was predicted; a JSON file and a table.

    python scripts/bench_gpu.py [--json FILE] [--size WxH …] [--repeat N] [--quick]

Networks are timed with CUDA events, the median of N calls after three; clips from the first frame asked for to the
last. A network's flops are those of its plain version (scripts/plain.py); "of peak" compares them with a matrix product
of 8192 x 8192 x 8192 in the same arithmetic, measured in the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from bench import FULL_HD, RELEASED_DECODER, on_meta, predicted
from bench_clips import drain, node, sample
from bench_networks import products
from plain import PlainDecoder, PlainUNet

import vapoursynth as vs
from vsuav import upscale
from vsuav.checkpoint import load
from vsuav.layers import lay_out
from vsuav.networks import exact_arithmetic, unload
from vsuav.settings import PRESETS
from vsuav.tiling import CHUNK, WINDOW
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE

COLUMNS = ("what", "input", "arithmetic", "ms", "GFLOP/s", "of peak", "frames/s", "MiB", "predicted")


def milliseconds(call: Callable[[], object], repeat: int) -> float:
    times = []
    with exact_arithmetic():
        for _ in range(repeat + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def peak_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b, 5) / 1e6


def gflop(sketch: Callable[[], object]) -> float:
    return sum(count * product.flops for product, count in products(sketch).items()) / 1e9


def most(call: Callable[[], object]) -> float:
    """MiB that a call needs at most, weights and all."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with exact_arithmetic():
        call()
    return torch.cuda.max_memory_allocated() / 2**20


def networks(name: str, unet: UNetVideo, vae: VAE, size: tuple[int, int], repeat: int) -> Iterator[dict]:
    width, height = size
    for dtype in (torch.float16, torch.float32):
        peak = peak_rate(dtype)
        network = lay_out(unet.to("cuda", dtype))
        x, low = (torch.randn(1, c, WINDOW, height, width, device="cuda", dtype=dtype) for c in (unet.config.out_channels, 3))
        text = torch.randn(1, 77, unet.config.cross_attention_dim, device="cuda", dtype=dtype)
        time_, level = (torch.full((1,), n, device="cuda") for n in (500, 20))
        with exact_arithmetic():
            prepared = network.prepare(text)
        taken = milliseconds(lambda: network(x, time_, low, prepared, level), repeat)  # noqa: B023
        plain = PlainUNet(unet.config, on_meta(unet.state_dict()))
        work = gflop(lambda: plain(*(v.to("meta", torch.float32) for v in (x,)), torch.empty(1, device="meta"), low.to("meta", torch.float32), text.to("meta", torch.float32), torch.empty(1, device="meta", dtype=torch.long)))  # noqa: B023, E501
        yield {"what": f"{name} U-Net, {WINDOW} frames", "input": f"{width}x{height}", "arithmetic": str(dtype)[6:],
               "ms": taken, "GFLOP/s": work / taken * 1e3, "of peak": work / taken * 1e3 / peak}  # fmt: skip
    decoder = lay_out(vae.float().to("cuda"))
    z, low = (torch.randn(1, c, CHUNK, height, width, device="cuda") for c in (vae.config.latent_channels, 3))
    level = torch.full((1,), 20, device="cuda")
    taken = milliseconds(lambda: decoder.decode(z, low, level), repeat)
    plain = PlainDecoder(vae.config, on_meta(vae.state_dict()))
    work = gflop(lambda: plain(z.to("meta"), low.to("meta"), torch.empty(1, device="meta", dtype=torch.long)))
    yield {"what": f"{name} video decoder, {CHUNK} frames", "input": f"{width}x{height}", "arithmetic": "float32",
           "ms": taken, "GFLOP/s": work / taken * 1e3, "of peak": work / taken * 1e3 / peak}  # fmt: skip


def memory(name: str, unet: UNetVideo, vae: VAE, size: tuple[int, int]) -> Iterator[dict]:
    """What a guided window and a decoded chunk take, beside what `bench.predicted` says."""
    width, height = size
    said = {what: needed / 2**20 for what, needed in predicted(unet.config, vae.config, torch.float16, width, height)}
    network = lay_out(unet.to("cuda", torch.float16))
    x, low = (torch.randn(2, c, WINDOW, height, width, device="cuda", dtype=torch.float16) for c in (unet.config.out_channels, 3))
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device="cuda", dtype=torch.float16)
    time_, level = (torch.full((1,), n, device="cuda") for n in (500, 20))
    with exact_arithmetic():
        prepared = network.prepare(text)
    row = {"input": f"{width}x{height}"}
    yield {"what": f"{name} U-Net, guided, weights and all", **row, "arithmetic": "float16",
           "MiB": most(lambda: network(x, time_, low, prepared, level)),
           "predicted": said["U-Net weights"] + said["U-Net activations, guided"]}  # fmt: skip
    network.cpu()
    del x, prepared
    decoder = lay_out(vae.float().to("cuda"))
    z, low = (torch.randn(1, c, CHUNK, height, width, device="cuda") for c in (vae.config.latent_channels, 3))
    yield {"what": f"{name} video decoder, weights and all", **row, "arithmetic": "float32",
           "MiB": most(lambda: decoder.decode(z, low, level)),
           "predicted": said["VAE weights, float32"] + said["VAE activations, float32"]}  # fmt: skip
    decoder.cpu()


def clips(size: tuple[int, int], length: int) -> Iterator[dict]:
    source = node(sample(length, size), vs.YUV420P8)
    for preset in PRESETS:
        for compile_ in ("none",):
            made = lambda: upscale(source, device="cuda", preset=preset, compile=compile_)  # noqa: B023, E731
            drain(made()[:9])
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            drain(made())
            taken = (time.perf_counter() - began) / length
            yield {"what": f"upscale, {preset}", "input": "{}x{}".format(*size), "arithmetic": "float16",
                   "ms": 1e3 * taken, "frames/s": 1 / taken, "MiB": torch.cuda.max_memory_allocated() / 2**20}  # fmt: skip
    unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("build/bench-gpu.json"))
    parser.add_argument("--size", action="append", metavar="WxH", help="input size; default: 160x120, 320x240, 480x270")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--length", type=int, default=48, help="frames of a clip")
    parser.add_argument("--quick", action="store_true", help="without the released networks")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.size or ("160x120", "320x240", "480x270")]
    rows = []

    def say(row: dict) -> None:
        rows.append(row)
        shown = (f"{row[c]:.1%}" if c == "of peak" else f"{row[c]:.1f}" if isinstance(row[c], float) else row[c] for c in COLUMNS if c in row)
        print(" | ".join(shown), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")

    models = load(None)
    with torch.no_grad():
        for size in sizes:
            for row in clips(size, options.length):
                say(row)
        for row in networks("bundled", models.unet, models.video_vae, sizes[0], options.repeat):
            say(row)
        for row in memory("bundled", models.unet, models.video_vae, FULL_HD):
            say(row)
        if not options.quick:
            with torch.device("cuda"):
                unet, vae = UNetVideo(UNetConfig()).requires_grad_(False), VAE(RELEASED_DECODER).requires_grad_(False)
            for row in networks("released", unet, vae, (64, 64), options.repeat):
                say(row)
            for row in memory("released", unet, vae, FULL_HD):
                say(row)


if __name__ == "__main__":
    main()
