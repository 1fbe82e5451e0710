"""Tokens from logits: `ops.sample` against transformers' warpers and torch's multinomial."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from apr import ops
from apr.bench import rates
from apr.bench.harness import Figure, in_turn, ratios

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "temperature, top-k 50": {"temperature": 0.8, "top_k": 50},
    "temperature, top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


def by_torch(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Any:
    """What generate() does with a step's logits, and the log-probabilities of what it drew."""
    made = LogitsProcessorList()
    if temperature:
        made.append(TemperatureLogitsWarper(temperature))
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))

    def step() -> Tensor:
        scores = made(None, logits.to(torch.float32, copy=True))
        drawn = torch.multinomial(scores.softmax(-1), 1) if temperature else scores.argmax(-1, True)
        return logits.float().log_softmax(-1).gather(1, drawn)

    return step


def bench_sampling(options: argparse.Namespace) -> Iterator[Figure]:
    """16 and 1 rows of bfloat16 logits, flat (random weights) and peaked (trained ones)."""
    words = (1000,) if options.smoke else (151_936, 262_144)
    for vocab in words:
        for rows in (1, 16):
            for shape, spread in (("flat", 1.0), ("peaked", 6.0)):
                generator = torch.Generator().manual_seed(0)
                logits = spread * torch.randn(rows, vocab, generator=generator)
                yield from _one(logits.bfloat16(), shape, options.seconds / 4)


def _one(logits: Tensor, shape: str, seconds: float) -> Iterator[Figure]:
    rows, vocab = logits.shape
    size = logits.numel() * logits.element_size()
    floor = size / rates.bytes_per_second(max(size, 1 << 20)) * 1e6
    print(f"{rows} rows of {vocab} words, {shape}: to read them once takes {floor:.0f} us")
    for name, how in OPTIONS.items():
        draws = ops.Draws(rows, key=range(rows), **how)
        actions: dict[str, Callable[[], Any]] = {
            "apr": partial(ops.sample, logits, draws),
            "torch": by_torch(logits, **how),
        }
        figures = in_turn(actions, seconds)
        median, low, high = ratios(figures["torch"], figures["apr"])
        for who, figure in figures.items():
            figure.name = f"{who}, {rows} x {vocab} {shape}, {name}"
            figure.facts = {"floor_us": round(floor, 1)}
        figures["apr"].note = f"torch / apr {median:.1f} [{low:.1f}, {high:.1f}]"
        for figure in figures.values():
            print(figure.line(), flush=True)
            yield figure
