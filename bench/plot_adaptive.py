"""Draws the figures of `python -m apr bench adaptive --json FILE`: accuracy against what it costs;
step against width.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


def solved_by(axes, cost: list[int], right: list[bool], label: str, **style) -> None:
    """Share of the problems that are solved at no more than so much each."""
    order = np.argsort(cost)
    share = np.cumsum(np.asarray(right)[order]) / len(right)
    axes.step(np.asarray(cost)[order], 100 * share, where="post", label=label, **style)


def main(source: Path, picture: Path) -> None:
    rows = {row["name"]: row for row in json.loads(source.read_text())["rows"]}
    spans = sorted({name.split(": ")[0] for name in rows if ": " in name})
    figure, grid = plt.subplots(len(spans), 3, figsize=(13, 4 * len(spans)), layout="constrained")
    for line, span in zip(np.atleast_2d(grid), spans, strict=True):
        arms = {
            n.split(": ", 1)[1]: r for n, r in rows.items() if n.startswith(span) and "curve" in r
        }
        greedy = {n: r for n, r in arms.items() if "greedy" in n}
        groups = {n: r for n, r in arms.items() if "greedy" not in n}
        for axes, key, title in (
            (line[0], "total", "all sampled tokens"),
            (line[1], "critical", "critical path, tokens"),
        ):
            for (name, row), color in zip(greedy.items(), ("tab:red", "tab:blue"), strict=True):
                solved_by(axes, row["curve"][key], row["curve"]["right"], name, color=color)
            for word, color in (("majority", "tab:gray"), ("best", "tab:green")):
                chosen = [r["curve"] for n, r in groups.items() if n.startswith(word)]
                points = [(np.mean(c[key]), 100 * np.mean(c["right"])) for c in chosen]
                axes.plot(
                    *zip(*points, strict=True),
                    "o--",
                    color=color,
                    label=f"{word} of n samples (means)",
                )
            axes.set(
                xscale="log",
                xlabel=f"{title} a problem",
                ylabel="held-out problems solved, %",
                title=span,
            )
        for name, row in arms.items():
            style = {"adaptive, greedy": "tab:red", "sequential, greedy": "tab:blue"}
            axes = line[2]
            color = style.get(name, "tab:green" if name.startswith("best") else "tab:gray")
            axes.plot(
                row["median_us"] / 1000, 100 * np.mean(row["curve"]["right"]), "o", color=color
            )
        line[2].set(
            xlabel="wall-clock, ms a problem (batched)",
            ylabel="held-out problems solved, %",
            title=span,
        )
        line[0].legend(frameon=False, fontsize=8)
        for axes in line:
            axes.grid(alpha=0.3)
            axes.set_ylim(0, 105)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
