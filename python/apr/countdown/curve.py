"""Draws the curve of a training run from its `training.json`."""

from __future__ import annotations

import json
from pathlib import Path


def plot_curve(record: Path, picture: Path) -> None:
    """Loss and what is right on held-out number sets, against optimiser steps; needs matplotlib
    (`pip install apr[plot]`).
    """
    import matplotlib.pyplot as plt

    curve = json.loads(record.read_text())["curve"]
    steps = [row["step"] for row in curve]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps, [row["loss"] for row in curve], color="tab:gray")
    left.set(xlabel="optimiser step", ylabel="training loss", yscale="log")
    for name in dict.fromkeys(name for row in curve for name in row):
        if name in ("step", "loss", "seconds", "tokens_per_second"):
            continue
        rows = [row for row in curve if name in row]
        shares = [100 * row[name] for row in rows]
        right.plot([row["step"] for row in rows], shares, label=name.replace("_", " "))
    right.set(xlabel="optimiser step", ylabel="held-out, %", ylim=(0, 100))
    right.legend(loc="lower right", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
