"""Train the small Countdown model: seeded, resumable (run it again to go on), on CPU or GPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path

from apr.countdown.curve import plot_curve
from apr.countdown.train import SMOKE, Recipe, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["countdown"])
    parser.add_argument("--out", type=Path, default=Path("countdown-model"), help="folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="optimiser steps; the shipped model's by default")
    parser.add_argument("--rows", type=int, help="rows of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's worth, to see it run")


def main(options: argparse.Namespace) -> None:
    recipe: Recipe = SMOKE if options.smoke else Recipe()
    given = {k: getattr(options, k) for k in ("steps", "rows", "seed")}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    every = max(1, recipe.steps // 40)
    for record in train(recipe, options.out, options.device, report_every=every):
        print("  ".join(f"{k} {v:g}" for k, v in record.items()), flush=True)
    with contextlib.suppress(ImportError):
        plot_curve(options.out / "training.json", options.out / "curve.png")
    print(f"saved to {options.out}; try: python -m apr run --checkpoint {options.out}")
