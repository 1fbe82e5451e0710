"""Draws docs/idea-light.svg and docs/idea-dark.svg: threads, their views, segments, and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).parent.parent / "docs"
INK = {"light": "#1f2328", "dark": "#e6edf3"}
FAINT = {"light": "#59636e", "dark": "#9198a1"}
SEGMENTS = {  # colour, tokens, pages
    "prompt": ("#5b8ff9", 7, 2),
    "A's own": ("#f6a35b", 3, 1),
    "B's own": ("#5bb98c", 4, 1),
    "root's, after the join": ("#b784e8", 2, 1),
}
VIEWS = {
    "child A": ["prompt", "A's own"],
    "child B": ["prompt", "B's own"],
    "root, after join([A, B])": ["prompt", "A's own", "B's own", "root's, after the join"],
}
CELL = 0.3


def box(axes: Any, x: float, y: float, width: float, height: float, **style: Any) -> None:
    shape = "round,pad=0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))


def draw_views(axes: Any, ink: str) -> dict[str, list[tuple[float, float]]]:
    """A row a thread; where each segment is listed."""
    listed: dict[str, list[tuple[float, float]]] = {name: [] for name in SEGMENTS}
    for row, (thread, view) in enumerate(VIEWS.items()):
        y = 4.6 - 1.15 * row
        axes.text(0.0, y + 0.55, thread, color=ink, fontsize=11, va="center")
        x = 0.0
        for name in view:
            color, tokens, _ = SEGMENTS[name]
            width = tokens * 0.17
            box(axes, x, y - 0.12, width, 0.42, facecolor=color, edgecolor="none", alpha=0.85)
            listed[name].append((x + width / 2, y - 0.12))
            x += width + 0.07
    return listed


def draw_segments(axes: Any, ink: str) -> dict[str, tuple[float, float]]:
    """Tokens in their segments, each once."""
    places = {}
    for row, (name, (color, tokens, _)) in enumerate(SEGMENTS.items()):
        y = 4.75 - 1.15 * row
        axes.text(4.6, y + 0.5, name, color=ink, fontsize=10, va="center")
        for i in range(tokens):
            x = 4.6 + i * CELL
            box(axes, x, y - 0.15, CELL - 0.05, 0.42, facecolor=color, edgecolor="none")
        places[name] = (4.6 + tokens * CELL, y + 0.06)
    return places


def draw_pages(axes: Any, places: dict[str, tuple[float, float]], ink: str, faint: str) -> None:
    """Pages of four tokens; a segment fills its own from the front."""
    number = 0
    order = [3, 0, 4, 1, 2]  # pages are handed out as they are free
    for name, (color, tokens, pages) in SEGMENTS.items():
        for k in range(pages):
            y = 4.6 - 0.95 * order[number]
            box(axes, 8.6, y - 0.2, 4 * CELL + 0.1, 0.55, facecolor="none", edgecolor=faint)
            for i in range(min(4, tokens - 4 * k)):
                x = 8.65 + i * CELL + 0.02
                box(axes, x, y - 0.11, CELL - 0.06, 0.37, facecolor=color, edgecolor="none")
            axes.text(10.0, y + 0.06, f"page {order[number]}", color=faint, fontsize=9, va="center")
            arrow = FancyArrowPatch(
                places[name],
                (8.55, y + 0.07),
                arrowstyle="-|>",
                mutation_scale=9,
                color=color,
                connectionstyle="arc3,rad=0.05",
            )
            axes.add_patch(arrow)
            number += 1


def draw(theme: str) -> None:
    ink, faint = INK[theme], FAINT[theme]
    figure, axes = plt.subplots(figsize=(9.6, 4.6), layout="constrained")
    for x, title, below in (
        (0.0, "threads and their views", "a fork copies a list, no keys"),
        (4.6, "segments", "each token's key and value is stored once"),
        (8.6, "pages", "of one pool a layer"),
    ):
        axes.text(x, 6.15, title, color=ink, fontsize=13, weight="bold")
        axes.text(x, 5.75, below, color=faint, fontsize=9)
    draw_views(axes, ink)
    draw_pages(axes, draw_segments(axes, ink), ink, faint)
    axes.text(
        0.0,
        0.85,
        "A step runs all threads' next tokens in one forward:\neach segment is read once for every "
        "thread that lists it,\nand partial results are merged by log-sum-exp.",
        color=faint,
        fontsize=9.5,
        va="top",
    )
    axes.set(xlim=(-0.1, 10.9), ylim=(-0.05, 6.5))
    axes.axis("off")
    plt.rcParams["svg.hashsalt"] = "apr"
    path = DOCS / f"idea-{theme}.svg"
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    for theme in INK:
        draw(theme)
