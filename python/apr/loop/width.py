"""What a decode step costs against its width, measured here: the width that is nearly free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from apr.errors import InvalidInput
from apr.threads.session import Session


@dataclass(frozen=True)
class WidthCurve:
    """What a decode step costs against the number of threads in it, here and with this model."""

    widths: list[int]
    seconds: list[float]  # median of a step
    context: int  # tokens that the threads share

    def free_width(self, price: float = 0.25) -> int:
        """The widest measured step whose threads beyond the first cost at most `price` lone steps
        each.

        They must on average, and the last that were added too: a bump on the way (a kernel for one
        row is another than that for two) does not end the search.
        """
        best, allowed = self.widths[0], price * self.seconds[0]
        for i in range(1, len(self.widths)):
            mean = (self.seconds[i] - self.seconds[0]) / (self.widths[i] - self.widths[0])
            last = (self.seconds[i] - self.seconds[i - 1]) / (self.widths[i] - self.widths[i - 1])
            if mean <= allowed and last <= allowed:
                best = self.widths[i]
        return best

    def plot(self, picture: str | Path) -> None:
        """Draw the curve into a file; needs matplotlib (`pip install apr[plot]`)."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
        axes.plot(self.widths, [1000 * s for s in self.seconds], "o-", label="measured")
        lone = [1000 * self.seconds[0] * w for w in self.widths]
        axes.plot(self.widths, lone, ":", color="tab:gray", label="one after the other")
        axes.axvline(self.free_width(), color="tab:red", lw=1, label="nearly free up to here")
        axes.set(xscale="log", yscale="log", xlabel="threads in a step", ylabel="ms a step")
        axes.legend(frameon=False)
        figure.savefig(picture, dpi=120)
        plt.close(figure)

    def __str__(self) -> str:
        lone = self.seconds[0]
        rows = [
            f"{w:4d} threads  {1000 * s:8.2f} ms  {s / lone:6.2f} lone steps  {w / s:8.0f} tokens/s"
            for w, s in zip(self.widths, self.seconds, strict=True)
        ]
        return "\n".join(rows)


def measure_width(
    session: Session,
    widths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    context: int = 256,
    repeats: int = 5,
) -> WidthCurve:
    """Time decode steps of several widths on a shared context of random tokens.

    The threads are made in `session` and released again. Widths that its pool cannot hold are left
    out.
    """
    if not widths or min(widths) < 1 or context < 1 or repeats < 1:
        raise InvalidInput("measure_width: widths, context and repeats must be at least 1")
    session.table.need_logits("measure_width")
    vocab = session.spec.vocab_size
    pages = session.memory.most_pages
    if session.on_full == "raise":  # else what is in use makes room
        pages -= session.stats.used_pages
    room = pages - -(-context // session.page_size)
    possible = [w for w in sorted(set(widths)) if w <= room] or [1]
    root = session.thread([(7919 * i + 13) % vocab for i in range(context)])
    try:
        session.step([root])
        medians = []
        for width in possible:
            threads = root.fork(width)
            try:
                times = []
                for k in range(repeats + 1):
                    for i, thread in enumerate(threads):
                        thread.extend([(31 * i + k) % vocab])
                    began = time.perf_counter()
                    session.step(threads)
                    times.append(time.perf_counter() - began)
                medians.append(median(times[1:]))  # the first step pays for new shapes
            finally:
                for thread in threads:
                    thread.release()
    finally:
        root.release()
    seconds = session.ranks.first(torch.tensor(medians, dtype=torch.float64, device="cpu"))
    return WidthCurve(possible, seconds.tolist(), context)
