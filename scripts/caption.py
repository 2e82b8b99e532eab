"""Captions one frame of every shot and writes the prompts by shot, for `vsuav restore --prompts` and `upscale`.

    .venv/bin/python scripts/caption.py INPUT OUTPUT.txt --model Salesforce/blip-image-captioning-base
    .venv/bin/python scripts/caption.py old.mkv old.txt --model /models/llava-1.5-7b-hf --suffix "sharp, detailed"
    .venv/bin/vsuav restore old.mkv new.mkv --prompts old.txt

INPUT is a video file, or a .vpy script whose output 0 is the clip that `upscale` will get. Shots are cut as `upscale`
cuts them. The model is any image-to-text model of transformers (BLIP, GIT, LLaVA, Qwen-VL, …), a folder or a hub id.
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import vapoursynth as vs
from PIL import Image

from vsuav import frames
from vsuav.plugin import evidence
from vsuav.shots import Record, Shots
from vsuav.video import MediaError, open_video

QUESTION = "Describe what this picture shows and its style, in one sentence."
"""Asked of models that chat; the others caption without being asked."""


class CaptionError(ValueError):
    """A model that cannot be used; one line that says what would work."""


class Captioner:
    """An image-to-text model: a picture in, one line of text out, always the same for the same picture.

    Args:
        model: a folder or a hub id.
        question: what the model is asked, or the words that its captions begin with if it does not chat; None asks
            those that chat `QUESTION`, and the others nothing.
        tokens: longest caption, in the model's tokens.
        device: where it runs, as PyTorch names it.

    Raises:
        CaptionError: transformers is missing, or `model` is no image-to-text model it can load.
    """

    def __init__(self, model: str, question: str | None = None, tokens: int = 60, device: str = "cpu"):
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
            from transformers.utils import logging
        except ImportError:
            raise CaptionError('transformers is missing: pip install "vsuav[caption]"') from None
        logging.disable_progress_bar()
        try:
            self._processor = AutoProcessor.from_pretrained(model)
            network = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CaptionError(f"{model} cannot be loaded as an image-to-text model: {first}") from None
        self._network = network.to(device).eval()
        self._question = question
        self._tokens = tokens

    def __call__(self, picture: Image.Image) -> str:
        """The caption of an RGB picture, on one line."""
        inputs = self._inputs(picture).to(self._network.device)
        floating = {name: value.to(self._network.dtype) for name, value in inputs.items() if value.is_floating_point()}
        with torch.inference_mode():
            tokens = self._network.generate(**{**inputs, **floating}, max_new_tokens=self._tokens, do_sample=False)[0]
        given = inputs.get("input_ids")
        if self._chats and given is not None and torch.equal(tokens[: given.shape[1]], given[0]):
            tokens = tokens[given.shape[1] :]  # models that only decode repeat the question
        return " ".join(self._processor.decode(tokens, skip_special_tokens=True).split())

    @property
    def _chats(self) -> bool:
        return getattr(self._processor, "chat_template", None) is not None

    def _inputs(self, picture: Image.Image):
        if not self._chats:
            return self._processor(images=picture, text=self._question, return_tensors="pt")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": self._question or QUESTION}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip


def shots(clip: vs.VideoNode, threshold: float = 0.1) -> list[range]:
    """The shots of a clip, as `upscale` cuts them: scene properties of its frames, else the detector."""
    rgb = frames.to_rgb(clip, frames.inspect(clip))
    records: list[Record] = [
        evidence(n, frame.props) for n, frame in enumerate(frames.differences(rgb).frames(close=True))
    ]
    found = Shots(len(records), records.__getitem__, threshold=threshold)
    cuts = [n for n in range(len(records) + 1) if found.cut(n)]
    return [range(first, stop) for first, stop in zip(cuts, cuts[1:], strict=False)]


def picture(clip: vs.VideoNode, n: int) -> Image.Image:
    """Frame n as an RGB picture."""
    frame = clip.resize.Bicubic(format=vs.RGB24).get_frame(n)
    return Image.fromarray(np.dstack([np.asarray(plane) for plane in frame]))


def captions(
    clip: vs.VideoNode, ask: Callable[[Image.Image], str], threshold: float = 0.1, suffix: str = ""
) -> Iterator[tuple[range, str]]:
    """Every shot with the caption of its middle frame (its ends may be fades), followed by `suffix`."""
    for shot in shots(clip, threshold):
        said = ask(picture(clip, (shot[0] + shot[-1]) // 2))
        yield shot, ", ".join(text for text in (said.rstrip(". "), suffix) if text)


def opened(path: Path) -> vs.VideoNode:
    """The clip of a video file, or output 0 of a script."""
    if path.suffix != ".vpy":
        return open_video(path).clip
    if not path.is_file():
        raise MediaError(f"no such file: {path}")
    runpy.run_path(str(path), run_name="__vapoursynth__")
    if 0 not in vs.get_outputs():
        raise MediaError(f"{path} sets no output 0")
    return vs.get_output(0).clip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("output", type=Path, metavar="OUTPUT.txt")
    parser.add_argument("--model", required=True, help="folder or hub id of an image-to-text model of transformers")
    parser.add_argument("--question", help="what the model is asked, or the words its captions begin with")
    parser.add_argument("--suffix", default="", help="words put behind every caption")
    parser.add_argument("--tokens", type=int, default=60, help="longest caption, in the model's tokens (60)")
    parser.add_argument("--threshold", type=float, default=0.1, help="scene_threshold of upscale (0.1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    try:
        clip = opened(given.input)
        ask = Captioner(given.model, given.question, given.tokens, given.device)
        lines = [f"# captions of {given.input.name} by {given.model}; a line is a shot's first frame and its prompt"]
        for shot, text in captions(clip, ask, given.threshold, given.suffix):
            print(f"frames {shot[0]}-{shot[-1]}: {text}", file=sys.stderr, flush=True)
            lines.append(f"{shot[0]} {text}")
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (CaptionError, MediaError, vs.Error, OSError, ValueError) as error:
        print(f"caption: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
