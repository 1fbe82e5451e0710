"""Trains the adaptive Countdown model on lessons: seeded, resumable, on CPU or GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apr.countdown.lessons import (
    HARD,
    draw_problem,
    guesses_record,
    parallel_record,
    sequential_record,
)
from apr.countdown.practice import practice
from apr.countdown.problems import Problem, Range
from apr.countdown.search import solutions
from apr.countdown.tokenizer import WORDS
from apr.countdown.training_run import TrainingRun, build_model, schedule
from apr.training import Batch, Flat, collate, flatten, microbatches


@dataclass(frozen=True)
class Lessons:
    """Everything that decides the checkpoint; written beside it as `training.json`."""

    steps: int = 5500
    trees: int = 14  # a step, four numbers
    deep_trees: int = 1  # a step, five numbers
    lines: int = 9  # sequential rows a step
    guesses: int = 48  # prompts a step, with three right guesses each
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 100
    muon: float = 1e-2  # its learning rate
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 384
    positions: int = 2048
    seed: int = 0
    highest: int = 20
    target: int = 100
    practice: int = 0  # steps on its own tries, after the supervised ones
    practice_rate: float = 0.2  # of the learning rates above, falling to 0
    practice_problems: int = 32  # a step
    practice_samples: int = 6  # of a problem
    tries: int = 3  # guesses of a sample, one after the other
    worth: float = 0.2  # share of right guesses from which on it should guess
    microbatch: int = 3072  # tokens, padding included
    bfloat16: bool = True

    @property
    def span(self) -> Range:
        return Range(highest=self.highest, target=self.target)


SMOKE = Lessons(
    steps=4,
    trees=4,
    deep_trees=1,
    lines=2,
    guesses=8,
    layers=2,
    warmup=2,
    practice=2,
    practice_problems=4,
)


def draw_lessons(
    recipe: Lessons, step: int, held_out: bool = False, decisions: bool = True
) -> list[Flat]:
    """The rows of one step, from a generator keyed by (seed, step): trees, lines, and guesses
    alone.
    """
    rng = random.Random(f"{recipe.seed}/{step}/{held_out}")

    def problem(count: int) -> Problem:
        # A fifth of the problems comes from the smaller range, which tables show too.
        small = rng.random() < 0.2
        span = Range(9, 50) if small else recipe.span
        return draw_problem(rng, count, span, held_out)

    records = [parallel_record(problem(4), rng, decisions=decisions) for _ in range(recipe.trees)]
    records += [parallel_record(problem(5), rng) for _ in range(recipe.deep_trees)]
    records += [sequential_record(problem(4), rng, decisions) for _ in range(recipe.lines)]
    while len(records) < recipe.trees + recipe.deep_trees + recipe.lines + recipe.guesses:
        candidate = problem(4)
        if solutions(candidate) > HARD:
            records.append(guesses_record(candidate, rng))
    return [flatten(record) for record in records]


def optimizers(model: Any, recipe: Lessons) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside (after 200 steps 86 % of held-out tokens were right, with AdamW
    alone 68 %), AdamW for the rest.
    """
    named = dict(model.named_parameters())
    inner = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in named.values() if all(p is not m for m in inner)]
    return [
        torch.optim.Muon(
            inner, recipe.muon, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            rest, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def forward(model: Any, recipe: Lessons, batch: Batch) -> Tensor:
    """Logits [rows, tokens, vocab] of a batch on the model's device."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
        logits: Tensor = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits
    return logits


def learn(
    model: Any,
    recipe: Lessons,
    steppers: list[torch.optim.Optimizer],
    flats: list[Flat],
    weights: Sequence[Sequence[float]] | None = None,
) -> tuple[float, int]:
    """One optimiser step; the summed loss in nats, and its tokens. weights: of each sequence's
    targets, or 1.
    """
    device = next(model.parameters()).device
    goal, total = sum(len(flat.targets) for flat in flats), 0.0
    for stepper in steppers:
        stepper.zero_grad()
    for batch in microbatches(flats, recipe.microbatch):
        batch = batch.to(device)
        losses = batch.loss(forward(model, recipe, batch), "none")
        if weights is not None:
            each = [w for row in batch.rows.tolist() for w in weights[row]]
            losses = losses * torch.tensor(each, device=device)
        loss = losses.sum()
        torch.autograd.backward(loss / goal)
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
    return total, goal


@torch.no_grad()
def examine(model: Any, recipe: Lessons, flats: list[Flat]) -> dict[str, float]:
    """Teacher-forced on held-out lessons: tokens right, and whole children right (a greedy child is
    one).
    """
    device = next(model.parameters()).device
    right = tokens = children = exact = 0
    for flat in flats:
        batch = collate([flat]).to(device)
        chosen = forward(model, recipe, batch).flatten(0, 1)[batch.sources].argmax(-1).cpu()
        hit = chosen == flat.ids[flat.targets]
        right, tokens = right + int(hit.sum()), tokens + len(hit)
        first = flat.ids[flat.starts[:-1]]
        for piece in range(1, len(first)):
            if WORDS[first[piece]] == "#":
                children += 1
                exact += int(hit[flat.piece[flat.targets] == piece].all())
    return {
        "tokens_right": round(right / tokens, 4),
        "children_exact": round(exact / max(1, children), 4),
    }


def _step(
    model: Any, recipe: Lessons, steppers: list[torch.optim.Optimizer], step: int
) -> tuple[float, int, int, float | None]:
    """One step of either phase: summed loss, its tokens, all tokens, the share of right guesses in
    practice.
    """
    flats = draw_lessons(recipe, step, decisions=step < recipe.steps)
    if step < recipe.steps:
        return *learn(model, recipe, steppers, flats), sum(map(len, flats)), None
    # The supervised lessons go on beside the guesses, so that nothing else is forgotten; when to
    # guess is for practice to teach.
    count = recipe.trees + recipe.deep_trees + recipe.lines
    flats = flats[:count]
    own, weights, share = practice(
        model,
        step,
        recipe.seed,
        recipe.span,
        recipe.practice_problems,
        recipe.practice_samples,
        recipe.tries,
        recipe.worth,
    )
    ones = [[1.0] * len(flat.targets) for flat in flats]
    learnt = learn(model, recipe, steppers, [*flats, *own], [*ones, *weights])
    return *learnt, sum(map(len, [*flats, *own])), share


def train(
    recipe: Lessons, out: Path, device: str = "cpu", report_every: int = 100
) -> Iterator[dict[str, Any]]:
    """Train, yielding a progress record every `report_every` steps; continues from `out/state.pt`.

    Step k draws everything from generators keyed by (seed, k), so a run that was interrupted makes
    the same checkpoint as one that was not (up to the reduction order of the machine).
    """
    model = build_model(recipe).to(device)
    steppers = optimizers(model, recipe)
    run = TrainingRun(out, device, model, steppers)
    rates = [
        schedule(s, recipe, run.first, recipe.practice, recipe.practice_rate) for s in steppers
    ]
    tests = [flat for k in range(2) for flat in draw_lessons(recipe, k, held_out=True)]
    total, seen, began, tokens, shares = 0.0, 0, time.perf_counter(), 0, []
    before = run.curve[-1]["seconds"] if run.curve else 0.0
    last = recipe.steps + recipe.practice
    for step in range(run.first, last):
        loss, counted, taken, share = _step(model, recipe, steppers, step)
        for rate in rates:
            rate.step()
        total, seen, tokens = total + loss, seen + counted, tokens + taken
        shares += [] if share is None else [share]
        if (step + 1) % report_every == 0 or step + 1 in (recipe.steps, last):
            model.eval()
            seconds = time.perf_counter() - began
            record = {
                "step": step + 1,
                "loss": round(total / seen, 4),
                "seconds": round(before + seconds, 1),
                "tokens_per_second": round(tokens / seconds),
                **examine(model, recipe, tests),
            }
            if shares:
                record["guesses_right"] = round(sum(shares) / len(shares), 4)
            model.train()
            total, seen, shares = 0.0, 0, []
            run.note(record)
            yield record
    run.finish("countdown", recipe)
