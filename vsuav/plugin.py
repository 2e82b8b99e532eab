"""`upscale(clip, …)`: what a script calls.

Frames are served in blocks of six on the absolute grid. For block k, native nodes run in this order:

    evidence  reads the records (cut? prompt? digest?) of the frames that can matter, as far as they are not known
    block     plans what is to be computed, reads exactly the input frames it needs, and computes on a worker;
              its one frame carries the six results as frame properties
    again     the same over all frames that can matter, if the store lost something between planning and computing

No callback ever waits for a frame: everything a callback reads is an input of its node.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import vapoursynth as vs
from torch import Tensor

from vsuav import frames
from vsuav.disk import Disk
from vsuav.engine import Engine, Missing
from vsuav.ensemble import ORIENTATIONS, Orientation
from vsuav.life import Life, lives_here
from vsuav.networks import NetworkError, Networks, choose
from vsuav.plan import evidence_span
from vsuav.progress import Progress
from vsuav.settings import is_real, is_whole
from vsuav.shots import Record, Records, Shots
from vsuav.store import Store
from vsuav.tiling import BLOCK
from vsuav.weights import ModelError

LINK = 32
"""Most input frames one node holds at a time."""
REQUESTS = 64
"""Requests far apart that may be under way at once: each needs its own evidence."""
KEPT_BLOCKS = 3
"""Blocks of results VapourSynth keeps."""
PROMPT = "_UAVPrompt"
"""Frame property that overrides the prompt of a frame."""


def upscale(
    clip: vs.VideoNode,
    model: str | Path | None = None,
    prompt: str | Sequence[tuple[int, str]] | None = None,
    negative_prompt: str | None = None,
    preset: str | None = None,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    noise_level: int | None = None,
    temperature: float | None = None,
    propagation_steps: Sequence[int] | None = None,
    propagation_radius: int = 16,
    reuse_steps: Sequence[int] | None = None,
    flow: str = "auto",
    degrain: float | None = None,
    video_vae: bool | None = None,
    tiny_vae: bool = False,
    color_fix: str | None = None,
    ensemble: int | None = None,
    scale: float = 4,
    width: int | None = None,
    height: int | None = None,
    scene_detect: bool = True,
    scene_threshold: float = 0.1,
    max_shot: int | None = None,
    tile: str | int | tuple[int, int] = "auto",
    tile_overlap: int = 16,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | str = "auto",
    compile: str = "none",
    cache_mib: int = 1024,
    cache_dir: str | Path | None = None,
    cache_dir_mib: int = 20480,
) -> vs.VideoNode:
    """Restore `clip` and enlarge it 4x by temporal diffusion. Any frame may be asked for at any time.

    A frame's value depends on the clip, the arguments, the weights, the device and the dtype, and on nothing else: not
    on what was asked for before, nor on caches, threads of VapourSynth, or restarts.

    Args:
        clip: any constant format and size, progressive, standard dynamic range. YUV needs `_Matrix`.
        model: folder of a model, or a hub id; None is the bundled model.
        prompt: what the video shows; one text, or a list of (first frame, text), where each change of the text starts a
            shot and the first text counts for the frames before it, too. The frame property `_UAVPrompt` wins. None:
            the model's own.
        negative_prompt: what it should not look like; acts where guidance does.
        preset: `reference`, `balanced`, `fast` or `preview`; sets what is None below.
        steps: sampling steps, 1…1000. A frame costs about this many U-Net calls on 8 frames, every 6 frames.
        solver: `ddim`, `dpm++2m` or `unipc`.
        guidance_scale: 0…100, of classifier-free guidance; 1 or less is off and halves the time.
        guidance_interval: (low, high) of timestep/1000 between which guidance acts.
        noise_level: 0…350; low keeps to the input, high invents detail.
        temperature: 0…1, standard deviation of the noise that sampling starts from. At 0 it starts from the mean, and
            `seed` decides less.
        propagation_steps: step indices after which latents are propagated along the optical flow.
        propagation_radius: 1…1000, frames a chain of propagation reaches at least.
        reuse_steps: step indices from 1 at which only the U-Net's outer ring is computed, with the deep features of the
            last step before that is not among them; faster, other pixels.
        flow: `raft` (needs weights in the model folder), `dis`, or `auto`.
        degrain: 0…1, weight of the frames before and after in what the decoder sees of a frame, brought to its place
            along the optical flow, where it can be trusted and they look alike; 0 is off. More is steadier and softer.
        video_vae: decode with the video decoder (False: the image decoder).
        tiny_vae: decode with the tiny decoder in the model's folder `vae_tiny`: faster, coarser.
        color_fix: `none`, `adain` or `wavelet`: brings colours back to the input's.
        ensemble: 1, 2 or 4: the mean of so many turned restorations; nearer to the truth, a little softer, as many
            times slower.
        scale: 1…4; below 4 the result is downscaled.
        width, height: size of the result instead of `scale`; one of them keeps the shape of the picture.
        scene_detect: False takes the clip as one shot (prompts and `max_shot` still cut).
        scene_threshold: luma difference of a cut, 0…1, where no `_SceneChangePrev`/`_SceneChangeNext` is set.
        max_shot: cut at its multiples (a multiple of 6, at least 24): cheaper seeks, other pixels.
        tile: (width, height) in input pixels of the pieces a network sees, at least 32 and more than twice the
            overlap; 0 for whole frames, or `auto`.
        tile_overlap: input pixels neighbouring tiles share.
        seed: 0…2**64 - 1, of the noise.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        dtype: `float32`, `bfloat16`, `float16` or `auto`.
        threads: 1…1024, CPU threads of the networks, or `auto`.
        compile: `kernels` has torch compile the networks for every shape, `graphs` records them as CUDA graphs too:
            minutes at the start for speed later, and other last bits; `none`.
        cache_mib: memory for latents, in MiB; changes speed, never pixels.
        cache_dir: folder in which final latents outlive the process.
        cache_dir_mib: most MiB of latents in it; its database takes some MiB more while it is open.

    Returns:
        A clip of the same length, rate and format, with the frame properties of `clip`. Matrix (of YUV), range and
        chroma location are the first frame's throughout, and each frame says them. Values beyond the format's black and
        white are clipped. Where the size asked for changes the picture's shape, the shape of its pixels makes up for
        it, if the clip says that shape.

    Raises:
        vs.Error: an argument or the clip cannot be used; one line that says what would work.
    """
    given = {name: value for name, value in locals().items() if name != "clip"}
    try:
        with torch.device("cpu"):  # whatever device the script has made torch's default
            return _upscale(clip, given)
    except (ValueError, TypeError, OSError, NetworkError) as error:
        raise vs.Error("upscale: " + " ".join(str(error).split())) from error


def _upscale(clip: vs.VideoNode, given: dict[str, Any]) -> vs.VideoNode:
    look = look_now(clip)
    size = _size(clip, given)
    budget, disk_budget = (_mebibytes(name, given[name]) for name in ("cache_mib", "cache_dir_mib"))
    models, settings = choose(given, clip.width, clip.height)
    networks = Networks(models, settings)
    networks.check_prompts([text for _, text in settings.prompts])
    orientations = ORIENTATIONS[settings.ensemble]
    budgets = budget // len(orientations), given["cache_dir"], disk_budget
    progress = Progress(Life().inform, copies=len(orientations))
    restorers = [Restorer(clip, networks, *budgets, orientation, progress) for orientation in orientations]
    return finished(lambda look: frames.mean([each.clip(look) for each in restorers]), clip, look, size)


def look_now(clip: vs.VideoNode) -> frames.Look | None:
    """The look of `clip`, or None where finding it could cost the work of another `upscale` of the same script.

    Raises:
        ValueError: the clip cannot be restored; one line.
    """
    frames.check(clip)
    return None if lives_here() else frames.look_of(clip)


def finished(
    restored: Callable[[frames.Look], vs.VideoNode],
    clip: vs.VideoNode,
    look: frames.Look | None,
    size: tuple[int, int],
) -> vs.VideoNode:
    """What the user gets: what `restored` gives, in the format of `clip` and in the `size` (width, height) asked for.

    Without a look, its nodes are made when a frame is asked for: they depend on the first frame of `clip`.
    """
    if look is not None:
        return frames.give_back(restored(look), clip, look, *size)
    blank = vs.core.std.BlankClip(frames.download(clip), width=size[0], height=size[1], keep=True)
    made: list[vs.VideoNode] = []

    def make(n: int, f: vs.VideoFrame) -> vs.VideoNode:
        if not made:
            try:
                look = frames.look_from(clip.format, f.props)
            except ValueError as error:
                raise vs.Error(f"upscale: {error}") from None
            made.append(frames.give_back(restored(look), clip, look, *size))
        return made[0]

    first = frames.download(clip)[:1].std.Loop(clip.num_frames)
    making = blank.std.FrameEval(make, prop_src=first)
    return blank.std.FrameEval(lambda n: made[0] if made else making)


def _size(clip: vs.VideoNode, given: dict[str, Any]) -> tuple[int, int]:
    """Width and height of the result."""
    scale, width, height = given["scale"], given["width"], given["height"]
    if not is_real(scale) or not 1 <= scale <= 4:
        raise ValueError(f"scale must be between 1 and 4, got {scale!r}")
    steps = 1 << clip.format.subsampling_w, 1 << clip.format.subsampling_h
    for name, value, side in (("width", width, clip.width), ("height", height, clip.height)):
        if value is not None and not (is_whole(value) and 1 <= value <= 4 * side):
            raise ValueError(f"{name} must be a whole number between 1 and {4 * side} (4x the input), got {value!r}")
    if width is None and height is None:
        size = round(clip.width * scale), round(clip.height * scale)
        return size[0] // steps[0] * steps[0], size[1] // steps[1] * steps[1]
    if width is None:
        width = min(4 * clip.width, max(1, round(height * clip.width / clip.height / steps[0])) * steps[0])
    if height is None:
        height = min(4 * clip.height, max(1, round(width * clip.height / clip.width / steps[1])) * steps[1])
    for name, value, step in (("width", width, steps[0]), ("height", height, steps[1])):
        if value % step:
            raise ValueError(f"{name} must be a multiple of {step} for {clip.format.name}, got {value}")
    return int(width), int(height)


def _mebibytes(name: str, value: Any) -> int:
    if not is_whole(value) or value < 0:
        raise ValueError(f"{name} must be a whole number of MiB, at least 0, got {value!r}")
    return int(value) << 20


class Restorer:
    """The nodes that restore one clip. It holds the source's nodes and none of the result's, so both can be freed.

    `orientation`: how the copy of the clip lies that it works on; its result lies as the clip does.
    `progress`: what is told of its blocks, shared by copies; its own, if none is given.
    """

    def __init__(
        self,
        clip: vs.VideoNode,
        networks: Networks,
        budget: int,
        cache_dir: str | Path | None,
        disk_budget: int,
        orientation: Orientation = ORIENTATIONS[1][0],
        progress: Progress | None = None,
    ):
        self._source, self._orientation = clip, orientation
        self._length = clip.num_frames
        self._networks = networks.transposed() if orientation.transposed else networks
        self._life = Life()
        self._progress = progress or Progress(self._life.inform)
        disk = None if cache_dir is None else Disk(cache_dir, disk_budget, self._life.warn)
        self.engine = Engine(self._networks, Store(budget), disk)
        self._records = Records(REQUESTS * len(self._span(self._length // BLOCK // 2)))
        self._budget_checked = False
        self._blank = vs.core.std.BlankClip(format=vs.GRAY8, width=16, height=16, length=1, keep=True)

    def clip(self, look: frames.Look) -> vs.VideoNode:
        """The restored clip: RGBS, 4x as large; `look` says how the source is to be read. To be called once."""
        core = vs.core
        self._rgb = frames.oriented(frames.to_rgb(self._source, look), self._orientation)
        self._evidence = self._evidence_node()
        grid = self._blank.std.Loop(-(-self._length // BLOCK))
        evidence = grid.std.FrameEval(self._gather_evidence)
        blocks = grid.std.FrameEval(self._compute, prop_src=evidence)
        blocks = grid.std.FrameEval(self._again, prop_src=blocks)
        blocks.std.SetVideoCache(mode=1, fixedsize=1, maxsize=KEPT_BLOCKS, maxhistory=KEPT_BLOCKS)
        results = core.std.Interleave([blocks] * BLOCK)[: self._length]
        template = core.std.BlankClip(self._rgb, width=4 * self._rgb.width, height=4 * self._rgb.height, keep=True)
        return frames.oriented(template.std.ModifyFrame([results], _hand_out), self._orientation)

    def shots(self, block: int) -> Shots:
        """The shots around a block, from evidence that has been read."""
        records = self._records.take(self._span(block))
        if records is None:
            raise vs.Error("upscale: more requests are under way than evidence is kept for; ask for fewer at once")
        settings = self._networks.settings
        return Shots(
            self._length, records.__getitem__, settings.prompt_at, settings.scene_detect, settings.scene_threshold,
            settings.max_shot,
        )  # fmt: skip

    def _span(self, block: int) -> range:
        first, last = block * BLOCK, min((block + 1) * BLOCK, self._length) - 1
        settings = self._networks.settings
        return evidence_span(first, last, self._networks.recipe, self._length, settings.max_shot is not None)

    def _evidence_node(self) -> vs.VideoNode:
        """A clip as long as the source whose frame n, once made, has put the record of n among the records."""
        blank = self._blank.std.Loop(self._length)
        inputs = [blank, frames.differences(self._rgb)] + ([self._rgb] if self.engine.disk else [])
        evidence = blank.std.ModifyFrame(inputs, functools.partial(_record, self._records, self._life.doubt))
        evidence.std.SetVideoCache(mode=0)  # a cached frame would bring no record
        return evidence

    def _gather_evidence(self, n: int) -> vs.VideoNode:
        self._check_budget()
        missing = self._records.missing(self._span(n))
        return self._joined([self._evidence[m] for m in missing]) if missing else self._blank

    def _joined(self, nodes: list[vs.VideoNode]) -> vs.VideoNode:
        """A one-frame node that needs the frames of all `nodes`, at most `LINK` of them at a time."""
        while len(nodes) > 1:
            groups = [nodes[i : i + LINK] for i in range(0, len(nodes), LINK)]
            nodes = [self._blank.std.ModifyFrame([self._blank, *group], _first) for group in groups]
        return nodes[0]

    def _compute(self, n: int, f: vs.VideoFrame) -> vs.VideoNode:
        shots = self.shots(n)
        return self._block_node(n, shots, self.engine.plan(n, shots).sources)

    def _again(self, n: int, f: vs.VideoFrame) -> vs.VideoNode:
        if "uav_missing" not in f.props:
            return self._blank.std.ModifyFrame(self._blank, functools.partial(_given, f))
        shots = self.shots(n)
        return self._block_node(n, shots, self.engine.fresh_plan(n, shots).sources)

    def _block_node(self, block: int, shots: Shots, sources: Iterable[int]) -> vs.VideoNode:
        """A one-frame node that reads the input frames `sources` and computes `block` from them."""
        wanted = sorted(sources)
        gathered: dict[int, Tensor] = {}
        links = []
        for i in range(0, len(wanted), LINK):
            group = wanted[i : i + LINK]
            inputs = [self._blank, *(self._rgb[m] for m in group)]
            links.append(self._blank.std.ModifyFrame(inputs, functools.partial(_gather, gathered, group)))
        run = functools.partial(self._run, block, shots, gathered)
        return self._blank.std.ModifyFrame(self._joined(links), run)

    def _run(self, block: int, shots: Shots, gathered: dict[int, Tensor], n: int, f: vs.VideoFrame) -> vs.VideoFrame:
        result = f.copy()
        try:
            progress = self._progress.block(block, min(BLOCK, self._length - block * BLOCK))
            pictures = self.engine.run(block, shots, gathered, self._life.watch(), progress)
        except Missing:
            result.props["uav_missing"] = 1
            return result
        except (NetworkError, ModelError) as error:
            raise vs.Error(f"upscale: {error}") from None
        finally:
            gathered.clear()
        for frame, picture in pictures.items():
            result.props[_name(frame)] = frames.to_frame(picture)
        return result

    def _check_budget(self) -> None:
        """Raise a budget that a linear pass would thrash to what it needs, and say so once."""
        if self._budget_checked:
            return
        self._budget_checked = True
        need = self.engine.working_set(self._rgb.height, self._rgb.width)
        if self.engine.store.raise_budget(need):
            self._life.warn(f"cache_mib is raised to {-(-need // 2**20)}: with less, frames would be computed twice")


def evidence(n: int, props: Mapping[str, Any], digest: bytes | None = None) -> Record:
    """What the frame properties of frame n say about shots and prompts; they are those of `frames.differences`.

    Raises ValueError for a prompt that is no text.
    """
    before, after = (props.get(name) for name in ("_SceneChangePrev", "_SceneChangeNext"))
    return Record(
        float(props["PlaneStatsDiff"]) if n else 0.0,
        None if before is None else bool(before),
        None if after is None else bool(after),
        frames.text_prop(props, PROMPT),
        digest,
    )


def _record(records: Records, doubt: Callable[[str, str], None], n: int, f: list) -> vs.VideoFrame:
    if said := frames.unfit(f[1].props):
        doubt(said[0], f"frame {n} says {said[0]} ({said[1]}), unlike the first; it is taken for one like that")
    digest = None
    if len(f) > 2:
        digest = blake2b(f"{f[2].width}x{f[2].height}".encode(), digest_size=16)
        for plane in range(3):
            digest.update(memoryview(f[2][plane]).tobytes())
        digest = digest.digest()
    try:
        records.put(n, evidence(n, f[1].props, digest))
    except ValueError as error:
        raise vs.Error(f"upscale: frame {n}: {error}") from None
    return f[0]


def _first(n: int, f: list) -> vs.VideoFrame:
    return f[0]


def _given(frame: vs.VideoFrame, n: int, f: vs.VideoFrame) -> vs.VideoFrame:
    return frame


def _gather(gathered: dict[int, Tensor], group: list[int], n: int, f: list) -> vs.VideoFrame:
    for number, frame in zip(group, f[1:], strict=True):
        gathered[number] = frames.to_tensor(frame)
    return f[0]


def _name(frame: int) -> str:
    return f"uav_{frame % BLOCK}"


def _hand_out(n: int, f: vs.VideoFrame) -> vs.VideoFrame:
    return f.props[_name(n)]


__all__ = ["Restorer", "upscale"]
