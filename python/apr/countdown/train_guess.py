"""Trains the small Llama of the package on Countdown guesses; seeded, resumable, on CPU or GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apr.countdown.problems import Problem, Range, format_chain, sample_problems, solved, verify
from apr.countdown.tokenizer import WORDS, build_tokenizer
from apr.countdown.training_run import TrainingRun, build_model, schedule


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint; written beside it as `training.json`."""

    steps: int = 10000
    rows: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 100
    hidden_size: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 384
    positions: int = 512
    seed: int = 0
    numbers: int = 3
    highest: int = 16
    target: int = 100

    @property
    def span(self) -> Range:
        return Range(highest=self.highest, target=self.target)


SMOKE = Recipe(steps=20, rows=64, layers=2, highest=6, warmup=5)


def training_rows(recipe: Recipe) -> tuple[Tensor, int]:
    """All solved training problems as token rows [rows, length], and the length of their
    prompts.
    """
    words = {word: i for i, word in enumerate(WORDS)}
    rows = []
    for problem, chain in solved(recipe.numbers, recipe.span, held_out=False):
        text = f"{problem.prompt} {format_chain(chain)} <eos>"
        rows.append([words[w] for w in text.split()])
    return torch.tensor(rows), len(problem.prompt.split())


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, problems: list[Problem], samples: int, seed: int
) -> dict[str, float]:
    """Held-out accuracy: greedy, sampled once, and with a verifier over 4 and `samples` samples."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    length = 4 * (len(problems[0].numbers) - 1) + 1
    ids = torch.tensor([tokenizer(p.prompt).input_ids for p in problems], device=device)
    generator = torch.Generator(device).manual_seed(seed)

    def complete(rows: Tensor, greedy: bool) -> list[str]:
        start = rows.shape[1]
        for _ in range(length):
            last = model(rows).logits[:, -1].float()
            drawn = torch.multinomial(last.softmax(-1), 1, generator=generator)
            rows = torch.cat([rows, last.argmax(-1, keepdim=True) if greedy else drawn], 1)
        texts: list[str] = tokenizer.batch_decode(rows[:, start:])
        return [t.split("<eos>")[0] for t in texts]

    greedy = [verify(p, t) for p, t in zip(problems, complete(ids, True), strict=True)]
    sampled = complete(ids.repeat_interleave(samples, 0), False)
    hits = np.array([verify(problems[i // samples], t) for i, t in enumerate(sampled)])
    hits = hits.reshape(len(problems), samples)
    model.train(was_training)
    return {
        "greedy": float(np.mean(greedy)),
        "sampled_once": float(hits[:, 0].mean()),
        "within_4": float(hits[:, :4].any(1).mean()),
        f"within_{samples}": float(hits.any(1).mean()),
    }


def train(
    recipe: Recipe, out: Path, device: str = "cpu", report_every: int = 500
) -> Iterator[dict[str, Any]]:
    """Train, yielding a progress record every `report_every` steps; continues from `out/state.pt`.

    Step k draws its rows from a generator keyed by (seed, k), so an interrupted run that resumes
    makes the same checkpoint as one that was never stopped (up to the reduction order of the
    machine).
    """
    tokenizer, model = build_tokenizer(), build_model(recipe).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    run = TrainingRun(out, device, model, [optimizer])
    rates = schedule(optimizer, recipe, run.first)
    rows, prompt = training_rows(recipe)
    rows = rows.to(device)
    tests = sample_problems(200, seed=1, count=recipe.numbers, span=recipe.span)
    began, total = time.perf_counter(), 0.0
    for step in range(run.first, recipe.steps):
        pick = np.random.default_rng([recipe.seed, step]).integers(0, len(rows), recipe.rows)
        batch = rows[torch.from_numpy(pick).to(device)]
        logits = model(batch[:, :-1]).logits[:, prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, prompt:].flatten()
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        total += loss.item()
        if (step + 1) % report_every == 0 or step + 1 == recipe.steps:
            record = {
                "step": step + 1,
                "loss": round(total / ((step % report_every) + 1), 4),
                "seconds": round(time.perf_counter() - began, 1),
                **evaluate(model, tokenizer, tests, 16, seed=2),
            }
            total = 0.0
            run.note(record)
            yield record
    run.finish("guess", recipe)
