"""The command line: arguments, progress, messages and exit codes.

Exit codes: 0 done, 1 an error (one line on stderr; -v shows where it came from), 2 wrong usage, 130 stopped by Ctrl-C.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

try:
    import rich.traceback
    import typer
    from rich import progress
    from rich.console import Console
except ImportError as missing:
    sys.exit(f'vsuav: {missing.name} is missing: pip install "vsuav[cli]"')

STOPPED = 130
EXTRA = ("av", "imageio_ffmpeg", "PIL")
"""Modules of the command line that are imported when a command needs them."""
EXAMPLES = "\n\n\b\nExamples:\n  "

app = typer.Typer(
    name="vsuav", help="Restore and upscale video 4x by temporal diffusion.", no_args_is_help=True,
    add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
models_app = typer.Typer(no_args_is_help=True, help="List, verify, convert and fetch models.")
app.add_typer(models_app, name="models")
console = Console(stderr=True, highlight=False)

Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show where an error came from.")]
Overwrite = Annotated[bool, typer.Option("-y", "--overwrite", help="Replace OUTPUT if it exists.")]
MODEL = "Folder, bundled name or hub id of the model. [default: the bundled one]"
Model = Annotated[str | None, typer.Option(help=MODEL)]


@contextlib.contextmanager
def reported(verbose: bool) -> Iterator[None]:
    """Turns exceptions into one line on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("vsuav: stopped", markup=False)
        raise typer.Exit(STOPPED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if verbose:
            console.print(rich.traceback.Traceback())
        said = str(error).rpartition("vapoursynth.Error: ")[2]  # of an error in a frame VapourSynth tells all it knows
        line = " ".join(said.split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
            line = f'{error.name} is missing: pip install "vsuav[cli]"'
        console.print(f"vsuav: {line}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


class Bar:
    """Progress on stderr: a bar on a terminal, else a line every tenth of the way."""

    def __init__(self):
        self._tenth = -1
        text = progress.TextColumn
        self._bar = progress.Progress(
            text("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(), text("frames,"),
            progress.TimeElapsedColumn(), text("gone,"), progress.TimeRemainingColumn(), text("left"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._id = self._bar.add_task("starting", total=None)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    def frames(self, done: int, total: int) -> None:
        self._bar.update(self._id, completed=done, total=total, description="restoring")
        if not console.is_terminal and total and 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            self.say(f"{done}/{total} frames")

    def task(self, first: int, last: int, done: int, total: int) -> None:
        self._bar.update(self._id, description=f"frames {first}-{last}: {100 * done // max(total, 1)} %")


@app.command(
    epilog=EXAMPLES + "vsuav restore old.mkv new.mkv\n  "
    "vsuav restore old.mkv new.mkv --prompt 'a street in the rain' --noise-level 60\n  "
    "vsuav restore old.mkv test.mkv --start 1:20 --end 1:25 --preset fast\n  "
    "vsuav restore old.mkv new.mp4 --scale 2 -- -c:v libx264 -crf 16 -preset slow"
)
def restore(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Any video file ffmpeg reads.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help=".mkv, which takes all, .mp4, .mov or .webm.")],
    encoder: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ENCODER OPTIONS]", help="For ffmpeg, instead of -c:v libx265 -crf 14 (10 bit)."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of lines FRAME TEXT: prompts that begin at these frames.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not look like.")] = None,
    noise_level: Annotated[int | None, typer.Option(help="0 keeps to the input … 350 invents detail.")] = None,
    model: Model = None,
    preset: Annotated[str | None, typer.Option(help="reference, balanced, fast or preview.")] = None,
    start: Annotated[str | None, typer.Option(help="From this time: 80, 1:20 or 0:01:20.5.")] = None,
    end: Annotated[str | None, typer.Option(help="Until this time.")] = None,
    scale: Annotated[float | None, typer.Option(help="1 to 4 times as large. [default: 4]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.")] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Keep latents in this folder. [default: OUTPUT.vsuav, removed when OUTPUT is complete]"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other argument of upscale; repeatable.")
    ] = None,
    progressive: Annotated[
        bool, typer.Option("--progressive", help="Take frames as progressive whatever the file says.")
    ] = False,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Restore a video file: 4 times as large, with its sound, subtitles, chapters, timestamps and colour tags.

    OUTPUT appears when it is complete. After Ctrl-C, a crash or a power cut, the same command again goes on where the
    last one stopped, and makes the same frames: computed latents are kept in OUTPUT.vsuav until then.
    """
    with reported(verbose):
        from vsuav import commands, video

        order = commands.Order(source, target, commands.parse_settings(settings or []), cache_dir=cache_dir)
        order.encoder, order.overwrite, order.progressive = encoder or (), overwrite, progressive
        order.start, order.end = (None if time is None else video.seconds(time) for time in (start, end))
        named = {
            "prompt": commands.read_prompts(prompts) if prompts else prompt, "negative_prompt": negative_prompt,
            "noise_level": noise_level, "model": model, "preset": preset, "scale": scale, "device": device,
        }  # fmt: skip
        order.settings |= {name: value for name, value in named.items() if value is not None}
        for ending in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup has a run go on after a logout
                signal.signal(ending, signal.default_int_handler)
        try:
            with Bar() as bar:
                commands.restore(order, bar)
        except KeyboardInterrupt:
            kept = cache_dir or commands.kept_latents(target)
            where = f"; the same command goes on from here (latents are in {kept})" if Path(kept).is_dir() else ""
            bar.say(f"vsuav: stopped{where}")
            sys.stderr.flush()
            os._exit(STOPPED)  # a running U-Net call may take minutes; what is on disk is whole at any time
        console.print(f"vsuav: wrote {target}", markup=False, soft_wrap=True)


@app.command(
    epilog=EXAMPLES + "vsuav compare old.mkv new.mkv page.html\n  "
    "vsuav compare old.mkv new.mkv picture.png --frame 240 --crop 400,300,320,240\n  "
    "vsuav compare old.mkv test.mkv both.mp4 --start 1:20"
)
def compare(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="What was restored.")],
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="What became of it.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help=".png, .html (a slider), or a video (.mkv, .mp4).")],
    start: Annotated[str | None, typer.Option(help="Time of INPUT at which RESULT begins.")] = None,
    frame: Annotated[list[int] | None, typer.Option(help="Frame of RESULT to show; repeatable.")] = None,
    crop: Annotated[str | None, typer.Option(metavar="X,Y,W,H", help="Show this part of RESULT.")] = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Show the input, the input enlarged by bicubic, and the result next to each other."""
    with reported(verbose):
        from vsuav import compare, video

        area = None
        if crop is not None:
            if not re.fullmatch(r"\d+(,\d+){3}", crop):
                raise video.MediaError(f"--crop is left,top,width,height in pixels of RESULT, got {crop!r}")
            area = tuple(map(int, crop.split(",")))
        begins = None if start is None else video.seconds(start)
        with Bar() as bar:
            compare.compare(source, result, target, begins, tuple(frame or ()), area, overwrite, bar.frames)
        console.print(f"vsuav: wrote {target}", markup=False, soft_wrap=True)


@app.command(epilog=EXAMPLES + "vsuav info\n  vsuav info old.mkv --preset fast")
def info(
    source: Annotated[Path | None, typer.Argument(metavar="INPUT", help="Say what restoring this video costs.")] = None,
    model: Model = None,
    preset: Annotated[str | None, typer.Option(help="reference, balanced, fast or preview.")] = None,
    start: Annotated[str | None, typer.Option(help="From this time.")] = None,
    end: Annotated[str | None, typer.Option(help="Until this time.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any argument of upscale; repeatable.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Say what is installed, which devices and models there are, and what a video will cost.

    The time is measured: the networks run a few times on noise of the video's size; where that would take minutes on a
    CPU, on two smaller sizes, from which it is extended.
    """
    with reported(verbose):
        from vsuav import commands, info, video

        if source is None:
            rows = info.machine()
        else:
            given = commands.parse_settings(settings or [])
            given |= {name: value for name, value in (("model", model), ("preset", preset)) if value is not None}
            opened = video.open_video(source)
            span = opened.between(*(None if time is None else video.seconds(time) for time in (start, end)))
            rows = info.price(opened, span, given).rows()
        for name, value in rows:
            typer.echo(f"{name:<24}{value}")


@models_app.command("list")
def models_list(verbose: Verbose = False) -> None:
    """List the models that came with the package and those in the hub's cache."""
    with reported(verbose):
        from vsuav import commands

        for name, folder in commands.found_models():
            typer.echo(f"{name}\t{folder}")


@models_app.command("verify")
def models_verify(
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    verbose: Verbose = False,
) -> None:
    """Load a model and check every tensor: names, shapes, finite values; exit code 1 if anything does not fit."""
    with reported(verbose):
        from vsuav import commands

        for line in commands.verify(model):
            typer.echo(line)


@models_app.command(
    "convert", epilog=EXAMPLES + "vsuav models convert pretrained_models/upscale_a_video uav --dtype float16"
)
def models_convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a model, such as the released .bin one.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="New folder.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. [default: as it is]")] = None,
    verbose: Verbose = False,
) -> None:
    """Write a model again with safetensors only, in diffusers layout."""
    with reported(verbose):
        import torch

        from vsuav import checkpoint

        dtypes = {None: None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if dtype not in dtypes:
            raise ValueError(f"--dtype must be float32, float16 or bfloat16, got {dtype}")
        checkpoint.convert(source, target, dtypes[dtype])
        console.print(f"vsuav: wrote {target}", markup=False, soft_wrap=True)


@models_app.command("fetch", epilog=EXAMPLES + "vsuav models fetch stabilityai/stable-diffusion-x4-upscaler")
def models_fetch(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub id.")], verbose: Verbose = False
) -> None:
    """Fetch a model from the hub into its cache, where it then works offline; prints the folder."""
    with reported(verbose):
        from vsuav import folders

        typer.echo(str(folders.fetch(name)))


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
