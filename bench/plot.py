"""Draws what `python -m apr bench width --json FILE` measured: time of a step's attention against
its width.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(record: dict, picture: Path) -> None:
    rows = record["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    methods = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.2), sharey=True)
    for axis, dtype in zip(axes if len(dtypes) > 1 else [axes], dtypes, strict=True):
        for method in methods:
            points = [r for r in rows if r["dtype"] == dtype and r["name"] == method]
            x = [r["threads"] for r in points]
            y = [r["median_us"] / 1000 for r in points]
            low = [r["p10_us"] / 1000 for r in points]
            high = [r["p90_us"] / 1000 for r in points]
            ours = method == "apr"
            (line,) = axis.plot(x, y, marker="o", lw=2.5 if ours else 1.2, label=method)
            axis.fill_between(x, low, high, alpha=0.2, color=line.get_color(), lw=0)
        axis.set(xscale="log", yscale="log", xlabel="threads", title=dtype)
        widths = sorted({r["threads"] for r in rows})
        axis.set_xticks(widths, [str(w) for w in widths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    (axes[0] if len(dtypes) > 1 else axes).set_ylabel(
        "attention of one step, ms (median, p10 to p90)"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    first, machine = rows[0], record["machine"]
    figure.suptitle(
        f"{first['prefix']} shared tokens, {first['own']} own tokens a thread\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['kernels']}",
        fontsize=10,
    )
    figure.set_layout_engine("constrained")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.figures.read_text()), options.picture)


if __name__ == "__main__":
    main()
