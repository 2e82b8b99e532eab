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
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import vapoursynth as vs
from bench import FULL_HD, RELEASED_DECODER, on_meta, predicted
from bench_clips import Size, drain, node, sample
from bench_networks import Call, products
from plain import PlainDecoder, PlainUNet

from vsuav import upscale
from vsuav.arithmetic import exact_arithmetic
from vsuav.checkpoint import load
from vsuav.layers import lay_out
from vsuav.networks import unload
from vsuav.settings import PRESETS
from vsuav.tiling import CHUNK, WINDOW
from vsuav.unet import UNetConfig, UNetVideo
from vsuav.vae import VAE

COLUMNS = ("what", "input", "arithmetic", "ms", "GFLOP/s", "of peak", "frames/s", "MiB", "predicted")


def milliseconds(call: Call, repeat: int) -> float:
    times = []
    with exact_arithmetic("cuda"):
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


def most(call: Call) -> float:
    """MiB that a call needs at most, weights and all."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with exact_arithmetic("cuda"):
        call()
    return torch.cuda.max_memory_allocated() / 2**20


def on_gpu(
    channels: tuple[int, ...], frames: int, size: Size, dtype: torch.dtype, batch: int = 1
) -> list[torch.Tensor]:
    """Noise "b c t h w" for each number of channels."""
    width, height = size
    return [torch.randn(batch, c, frames, height, width, device="cuda", dtype=dtype) for c in channels]


def unet_call(unet: UNetVideo, size: Size, dtype: torch.dtype, batch: int) -> tuple[Call, list[torch.Tensor]]:
    """A window, with the text's keys computed before as the engine does, and its inputs as the plain network wants."""
    x, low = on_gpu((unet.config.out_channels, 3), WINDOW, size, dtype, batch)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, device="cuda", dtype=dtype)
    step, level = (torch.full((1,), n, device="cuda") for n in (500, 20))
    with exact_arithmetic("cuda"):
        prepared = unet.prepare(text)
    return partial(unet, x, step, low, prepared, level), [x, step, low, text, level]


def decoder_call(vae: VAE, size: Size) -> tuple[Call, list[torch.Tensor]]:
    z, low = on_gpu((vae.config.latent_channels, 3), CHUNK, size, torch.float32)
    inputs = [z, low, torch.full((1,), 20, device="cuda")]
    return partial(vae.decode, *inputs), inputs


def gflop(plain: Call, inputs: list[torch.Tensor]) -> float:
    """Of the plain version of a network, which holds its weights on the meta device."""
    sketch = partial(plain, *(v.to("meta", torch.float32 if v.is_floating_point() else v.dtype) for v in inputs))
    return sum(count * product.flops for product, count in products(sketch).items()) / 1e9


def networks(name: str, unet: UNetVideo, vae: VAE, size: Size, repeat: int) -> Iterator[dict]:
    shape = "{}x{}".format(*size)
    for dtype in (torch.float16, torch.float32):
        call, inputs = unet_call(lay_out(unet.to("cuda", dtype)), size, dtype, 1)
        taken = milliseconds(call, repeat)
        rate = gflop(PlainUNet(unet.config, on_meta(unet.state_dict())), inputs) / taken * 1e3
        named = str(dtype).removeprefix("torch.")
        yield {"what": f"{name} U-Net, {WINDOW} frames", "input": shape, "arithmetic": named,
               "ms": taken, "GFLOP/s": rate, "of peak": rate / peak_rate(dtype)}  # fmt: skip
    call, inputs = decoder_call(lay_out(vae.to("cuda", torch.float32)), size)
    taken = milliseconds(call, repeat)
    rate = gflop(PlainDecoder(vae.config, on_meta(vae.state_dict())), inputs) / taken * 1e3
    yield {"what": f"{name} video decoder, {CHUNK} frames", "input": shape, "arithmetic": "float32",
           "ms": taken, "GFLOP/s": rate, "of peak": rate / peak_rate(torch.float32)}  # fmt: skip


def memory(name: str, unet: UNetVideo, vae: VAE, size: Size) -> Iterator[dict]:
    """What a guided window and a decoded chunk take, beside what `bench.predicted` says."""
    said = {what: needed / 2**20 for what, needed in predicted(unet.config, vae.config, torch.float16, *size)}
    shape = "{}x{}".format(*size)
    call, _ = unet_call(lay_out(unet.to("cuda", torch.float16)), size, torch.float16, 2)
    yield {"what": f"{name} U-Net, guided, weights and all", "input": shape, "arithmetic": "float16", "MiB": most(call),
           "predicted": said["U-Net weights"] + said["U-Net activations, guided"]}  # fmt: skip
    unet.cpu()
    del call
    call, _ = decoder_call(lay_out(vae.to("cuda", torch.float32)), size)
    yield {"what": f"{name} video decoder, weights and all", "input": shape, "arithmetic": "float32", "MiB": most(call),
           "predicted": said["VAE weights, float32"] + said["VAE activations, float32"]}  # fmt: skip
    vae.cpu()


def clips(size: Size, length: int) -> Iterator[dict]:
    source = node(sample(length, size), vs.YUV420P8)
    for preset in PRESETS:
        drain(upscale(source[:9], device="cuda", preset=preset))
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        drain(upscale(source, device="cuda", preset=preset))
        taken = (time.perf_counter() - began) / length
        yield {"what": f"upscale, {preset}", "input": "{}x{}".format(*size), "arithmetic": "float16",
               "ms": 1e3 * taken, "frames/s": 1 / taken, "MiB": torch.cuda.max_memory_allocated() / 2**20}  # fmt: skip
    unload()


def shown(column: str, value: float | str) -> str:
    return f"{value:.1%}" if column == "of peak" else f"{value:.1f}" if isinstance(value, float) else value


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("build/bench-gpu.json"))
    parser.add_argument("--size", action="append", metavar="WxH", help="input size; default: 160x120, 320x240, 480x270")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--length", type=int, default=48, help="frames of a clip")
    parser.add_argument("--quick", action="store_true", help="without the released networks")
    options = parser.parse_args(given)
    sizes = [tuple(map(int, size.split("x"))) for size in options.size or ("160x120", "320x240", "480x270")]
    rows = []

    def say(row: dict) -> None:
        rows.append(row)
        print(" | ".join(f"{column} {shown(column, row[column])}" for column in COLUMNS if column in row), flush=True)
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
