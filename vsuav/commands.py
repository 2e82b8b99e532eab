"""What the commands `restore` and `models` do, apart from reading their arguments."""

import ast
import gc
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vapoursynth as vs

from vsuav import checkpoint, disk, folders
from vsuav.containers import SOUND_OF
from vsuav.parts import MediaError, alone, check_target
from vsuav.plugin import upscale
from vsuav.unet import UNetConfig
from vsuav.vae import VAEConfig
from vsuav.video import DEFAULT_ENCODER, Writer, deepened, open_video, ten_bit

TASK = re.compile(r"upscale: frames (\d+) to (\d+): task (\d+) of (\d+)")
"""The engine's progress in VapourSynth's log."""
NOT_SETTABLE = {"clip", "cache_dir"}


@dataclass
class Order:
    """What `restore` is asked to do. `settings` are arguments of `upscale`; times are seconds from the file's start."""

    source: Path
    target: Path
    settings: dict[str, Any] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    encoder: Sequence[str] = ()
    cache_dir: Path | None = None
    overwrite: bool = False
    progressive: bool = False


class Reports:
    """What a running command tells: all methods do nothing here."""

    def say(self, line: str) -> None:
        """Something the user should read."""

    def frames(self, done: int, total: int) -> None:
        """Frames written."""

    def task(self, first: int, last: int, done: int, total: int) -> None:
        """The networks' work on the frames `first` … `last`."""


def kept_latents(target: Path) -> Path:
    """Where `restore` keeps its latents until `target` is complete."""
    return target.with_name(f"{target.name}.vsuav")


def restore(order: Order, reports: Reports) -> None:
    """Restore a video file. The target appears when it is complete; until then final latents are kept beside it.

    Stopping loses no more than the block being computed: the same order again finds the latents of all blocks before.

    Raises:
        MediaError, vs.Error: one line that says what is wrong and what would work.
    """
    source, target = order.source.resolve(), order.target.resolve()
    check_target(target, {"INPUT": source}, SOUND_OF, order.overwrite)
    kept = kept_latents(target)
    with alone(target, kept) as note:
        new, written = not (kept / disk.FILE).exists(), 0
        handler = vs.core.add_log_handler(_log_to(reports))
        try:
            video = open_video(source)
            clip = deepened(video.clip)
            if order.progressive:
                clip = clip.std.SetFieldBased(0)
            span = video.between(order.start, order.end)
            result = upscale(clip, **order.settings, cache_dir=str(order.cache_dir or kept))
            result = ten_bit(result)[span.start : span.stop]
            result.set_output()  # the engine stops between two tasks when the outputs are cleared
            writer = Writer(result, video, span, target, order.encoder or DEFAULT_ENCODER)
            writer.check()
            for line in (*video.lost, *writer.lost):
                reports.say(f"left out: {line}")
            reports.frames(0, len(span))
            with writer:
                note(writer.part)
                for written, frame in enumerate(result.frames(close=True), 1):  # noqa: B007
                    writer.write(written - 1, frame)
                    reports.frames(written, len(span))
        except BaseException:
            if new and not written:
                _forget(kept)
            raise
        finally:
            vs.clear_outputs()
            vs.core.remove_log_handler(handler)
        if order.cache_dir is None:
            del result, writer
            gc.collect()
            _forget(kept)


def _forget(folder: Path) -> None:
    """Remove the latents that are kept in a folder, and nothing else of it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        (folder / f"{disk.FILE}{suffix}").unlink(missing_ok=True)


def _log_to(reports: Reports) -> Callable[[vs.MessageType, str], None]:
    def handle(kind: vs.MessageType, line: str) -> None:
        if match := TASK.match(line):
            reports.task(*map(int, match.groups()))
        elif kind >= vs.MESSAGE_TYPE_WARNING:
            reports.say(line)

    return handle


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Arguments of `upscale` from ``name=value``; values are Python literals, or text where they are none."""
    names = inspect.signature(upscale).parameters.keys() - NOT_SETTABLE
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in names:
            raise MediaError(f"--set takes NAME=VALUE with a name of {', '.join(sorted(names))}; got {pair!r}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Prompts by shot: lines of a first frame and a text, such as ``240 a street in the rain``; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"cannot read the prompts of {path}: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        first, *text = line.split(maxsplit=1)
        if not first.isdecimal():
            raise MediaError(f"{path}, line {number}: a line is a frame number and a text, got {line.strip()!r}")
        prompts.append((int(first), "".join(text).strip()))
    if not prompts:
        raise MediaError(f"{path} holds no prompts; a line is a frame number and a text")
    return prompts


def found_models() -> list[tuple[str, str]]:
    """Names and folders of the models that came with the package, and of those in the hub's cache."""
    rows = []
    home = folders.bundled()
    if home is not None:
        rows += [(p.name, str(p)) for p in sorted(home.parent.iterdir()) if (p / "model_index.json").is_file()]
    try:
        from huggingface_hub import scan_cache_dir

        repositories = sorted(scan_cache_dir().repos, key=lambda repository: repository.repo_id)
    except Exception:  # no cache yet, or one that cannot be read: nothing is found there
        return rows
    for repository in repositories:
        for revision in repository.revisions:
            try:
                folders.find_parts(revision.snapshot_path)
            except checkpoint.ModelError:
                continue
            rows.append((repository.repo_id, str(revision.snapshot_path)))
    return rows


def verify(model: str) -> list[str]:
    """Load a model strictly and describe what was found, a line each. Raises ModelError where anything does not fit."""
    models = checkpoint.load(model)
    lines = [f"folder         {models.path}", f"kind           {models.kind}"]
    released = {
        "unet": UNetConfig(),
        "vae": VAEConfig(),
        "video_vae": VAEConfig(up_block_types=("UpDecoderBlock3D_plus",) * 3, condition_img=True),
    }
    for name, config in released.items():
        network = getattr(models, name)
        if network is None:
            lines.append(f"{name:<14} none")
            continue
        count = sum(parameter.numel() for parameter in network.parameters())
        tensors = len(dict(network.named_parameters()))
        sizes = ", the released sizes" if network.config == config else ""
        lines.append(f"{name:<14} {tensors} tensors, {count:,} parameters, all fit{sizes}")
    lines.append(f"flow weights   {models.raft or 'none (DIS needs none)'}")
    if models.raft is not None:
        models.raft_network()
    prompts = json.dumps(sorted(models.text.stored), ensure_ascii=False)
    lines += [f"stored prompts {prompts}", f"defaults       {json.dumps(models.defaults)}"]
    return [*lines, f"digest         {models.digest}"]
