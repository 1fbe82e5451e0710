"""Train a small Countdown model: seeded, resumable (run it again to go on), on CPU or GPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apr.countdown import train_adaptive, train_guess
from apr.countdown.curve import plot_curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "task",
        choices=["countdown", "guess"],
        help="countdown: the adaptive model, 4 and 5 numbers; guess: 3 numbers, no search",
    )
    parser.add_argument("--out", type=Path, default=Path("countdown-model"), help="folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="optimiser steps; the shipped model's by default")
    parser.add_argument(
        "--practice", type=int, help="then so many steps on its own tries (countdown); 0 by default"
    )
    parser.add_argument("--rows", type=int, help="rows of a step (guess)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's worth, to see it run")


def _records(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    given = {k: getattr(options, k) for k in ("steps", "seed") if getattr(options, k) is not None}
    if options.task == "countdown":
        if options.practice is not None:
            given["practice"] = options.practice
        lessons = train_adaptive.SMOKE if options.smoke else train_adaptive.Lessons()
        lessons = dataclasses.replace(lessons, **given)
        every = max(1, lessons.steps // 55)
        return train_adaptive.train(lessons, options.out, options.device, report_every=every)
    recipe = train_guess.SMOKE if options.smoke else train_guess.Recipe()
    if options.rows is not None:
        given["rows"] = options.rows
    recipe = dataclasses.replace(recipe, **given)
    every = max(5, recipe.steps // 40)
    return train_guess.train(recipe, options.out, options.device, report_every=every)


def main(options: argparse.Namespace) -> None:
    for record in _records(options):
        print("  ".join(f"{k} {v:g}" for k, v in record.items()), flush=True)
    with contextlib.suppress(ImportError):
        plot_curve(options.out / "training.json", options.out / "curve.png")
    method = "--method adaptive " if options.task == "countdown" else ""
    print(f"saved to {options.out}; try: python -m apr run {method}--checkpoint {options.out}")
