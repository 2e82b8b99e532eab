"""Weights as a mixture of stages: shares of what several trainings found, part by part.

    python scripts/mix.py NAME [--config scripts/mini.json] [--out runs/mini]

reads OUT/STAGE.pt of the stages that the configuration's mixture NAME names and writes OUT/NAME.pt, which export.py
and train.py take. A mixture is

    "parts"   [pattern, {stage: share}], a regular expression found in the names of parameters and shares whose sum is 1
              (a share may lie outside of 0 … 1: the straight line through two trainings goes on behind them, "task
              arithmetic", Ilharco et al. 2023). Of several patterns the last one counts, and every name needs one.
    "shares"  what is added to how far the enlarger is trusted at each of the trained noise levels
"""

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor
from train import LEVELS, fill_levels, write_atomically

TRUST = "vae_video.enlarger.class_embedding.weight"


def shares_of(name: str, parts: list) -> dict[str, float]:
    """What counts for a parameter.

    Raises:
        ValueError: no pattern is found in its name, or the shares' sum is not 1.
    """
    found = [shares for pattern, shares in parts if re.search(pattern, name)]
    if not found:
        raise ValueError(f"mix: parts must have a pattern for every parameter, got none for {name}")
    if abs(sum(found[-1].values()) - 1) > 1e-9:
        raise ValueError(f"mix: shares must have the sum 1, got {found[-1]} for {name}")
    return found[-1]


def mix(mixture: dict, weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mixture of `weights`, stage -> name -> parameter."""
    names = next(iter(weights.values()))
    shares = {name: shares_of(name, mixture["parts"]) for name in names}
    result = {n: sum(share * weights[stage][n].float() for stage, share in shares[n].items()) for n in names}
    if "shares" in mixture:
        table = result[TRUST]
        table[list(LEVELS)] += torch.tensor(mixture["shares"])[:, None]
        fill_levels(table)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="one of the configuration's mixtures")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("mini.json"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="where the stages' weights lie")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    mixtures = config.get("mixtures", {})
    if args.name not in mixtures:
        parser.error(f"NAME must be one of {', '.join(mixtures) or 'none'}, got {args.name!r}")
    mixture = mixtures[args.name]
    stages = sorted({stage for _, shares in mixture["parts"] for stage in shares})
    saved = {s: torch.load(args.out / f"{s}.pt", map_location="cpu", weights_only=True)["weights"] for s in stages}
    flat = {s: {f"{k}.{n}": v for k, state in w.items() for n, v in state.items()} for s, w in saved.items()}
    mixed = mix(mixture, flat)
    weights = {k: {n: mixed[f"{k}.{n}"] for n in state} for k, state in saved[stages[0]].items()}
    target = args.out / f"{args.name}.pt"
    write_atomically(target, {"weights": weights, "stage": args.name, "step": 0, "config": config})
    print(target)


if __name__ == "__main__":
    main()
