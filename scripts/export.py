"""Write trained weights as a model folder that vsuav loads.

    python scripts/export.py runs/mini/vae_video.pt models/mini [--data data]

Networks are stored as float16 safetensors; the states of the prompts the model was trained with go along, so that
those prompts need no text encoder. Defaults and presets come from the training configuration's "model". A model that
began as a folder (`train.py --init FOLDER`) gets that folder's text encoder as well.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from vsuav.checkpoint import load

ROTARY = "temporal_rotary_emb.freqs"


def export(source: Path, target: Path, prompts: Path, config: dict | None = None) -> int:
    """Returns the size of the folder's weights in bytes."""
    saved = torch.load(source, map_location="cpu", weights_only=True)
    config = config or saved["config"]
    for name, weights in saved["weights"].items():
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config[name], indent=2) + "\n")
        copies = [key for key in weights if key.endswith("rotary_emb.freqs") and key != ROTARY]
        kept = {key: value.half().contiguous() for key, value in weights.items() if key not in copies}
        save_file(kept, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for name in ("scheduler", "low_res_scheduler"):
        (target / name).mkdir(exist_ok=True)
        schedule = config.get(name, config["scheduler"])
        (target / name / "scheduler_config.json").write_text(json.dumps(schedule, indent=2) + "\n")
    for name in ("tokenizer", "text_encoder"):
        if "folder" in config and (Path(config["folder"]) / name).is_dir():
            shutil.copytree(Path(config["folder"]) / name, target / name, dirs_exist_ok=True)
    index = {"_class_name": "VsuavPipeline", "vsuav": config["model"]}
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if prompts.resolve() != (target / "prompts.safetensors").resolve():
        shutil.copyfile(prompts, target / "prompts.safetensors")
    load(target)
    return sum(path.stat().st_size for path in target.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write trained weights as a model folder.")
    parser.add_argument("weights", type=Path, help="a STAGE.pt of scripts/train.py")
    parser.add_argument("target", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where prompts.safetensors lies")
    parser.add_argument("--config", type=Path, help="take defaults and presets from here, not from the weights file")
    args = parser.parse_args()
    config = json.loads(args.config.read_text()) if args.config else None
    beside = args.weights.with_name("prompts.safetensors")
    prompts = beside if beside.is_file() else args.data / "prompts.safetensors"
    size = export(args.weights, args.target, prompts, config)
    print(f"{args.target}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
