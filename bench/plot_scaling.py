"""Draws what `python -m apr bench scaling --json FILE` measured: host time of a step against
history, threads and segments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AXES = {"history": "tokens of the prompt", "threads": "threads", "segments": "forks in the session"}


def draw(record: dict, picture: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    for axis, (name, label) in zip(axes, AXES.items(), strict=True):
        points = [row for row in record["rows"] if row["axis"] == name]
        x = [row["x"] for row in points]
        axis.plot(x, [row["median_us"] / 1000 for row in points], "o-")
        low, high = ([row[p] / 1000 for row in points] for p in ("p10_us", "p90_us"))
        axis.fill_between(x, low, high, alpha=0.2, lw=0)
        top = max(high)
        axis.set(xlabel=label, xscale="log", ylim=(0, None if name == "threads" else 3 * top))
        if name == "threads":
            axis.set(yscale="log", ylim=(0.1, 20))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("a step beside the model, ms")
    machine = record["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores; medians, p10 to p90", fontsize=9)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
