"""A light reinforcement phase: the model practises its own guesses, and learns when one is worth its tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apr.countdown.lessons import draw_problem, encode, prompt
from apr.countdown.problems import Problem, Range, verify
from apr.countdown.tokenizer import WORDS
from apr.record import Record
from apr.training import Flat, flatten

_CHAIN = 12  # words of a guess over four numbers


@torch.no_grad()
def sample_guesses(
    model: Any, problems: Sequence[Problem], mode: str, samples: int, seed: int
) -> Tensor:
    """Guesses [problems, samples, 12] of token ids, drawn after `<try>` at temperature 1."""
    device = next(model.parameters()).device
    ids = torch.tensor([encode([*prompt(p, mode).split(), "<try>"]) for p in problems])
    rows = ids.to(device).repeat_interleave(samples, 0)
    generator = torch.Generator(device).manual_seed(seed)
    cache, written, step = None, [], rows
    for _ in range(_CHAIN):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        written.append(step)
    return torch.cat(written, 1).view(len(problems), samples, _CHAIN).cpu()


def lesson_of_guesses(
    problem: Problem, mode: str, guesses: Tensor, worth: float
) -> tuple[Flat, list[float], float]:
    """The flat lesson, a weight for each of its targets, and the share of right guesses.

    Words of a guess weigh its advantage: right (1) or wrong (0) less the mean over the group, as in GRPO
    (arXiv 2402.03300) without its scale. The verdict, and what follows a miss, are taught as they should
    have been. Whether to guess at all is taught by the share: below `worth` a guess costs more tokens of
    the critical path than it saves.
    """
    record, weights = Record(), []
    root = record.start(encode(prompt(problem, mode).split()))
    search = "<spawn>" if mode == "parallel" else "#"
    rights = []
    for row in guesses.tolist():
        rights.append(verify(problem, " ".join(WORDS[i] for i in row)))
    share = sum(rights) / len(rights)
    decision = "<try>" if share >= worth else search
    record.write(record.after(root), encode([decision]), sampled=True)
    weights.append(1.0)
    for row, right in zip(guesses.tolist(), rights, strict=True):
        piece = record.after(root)
        record.write(piece, encode(["<try>"]), sampled=False)
        record.write(piece, row, sampled=True)
        weights += [float(right) - share] * len(row)
        verdict = ["<ok>", "<eos>"] if right else ["<miss>", search]
        record.write(piece, encode(verdict), sampled=True)
        weights += [1.0 / len(rights)] * len(verdict)
    return flatten(record), weights, share


def practice(
    model: Any, step: int, seed: int, span: Range, problems: int, samples: int, worth: float
) -> tuple[list[Flat], list[list[float]], float]:
    """Lessons on the model's own guesses for one step, their weights, and the mean share of right ones."""
    rng = random.Random(f"{seed}/practice/{step}")
    mode = ("parallel", "sequential")[step % 2]
    drawn = [
        draw_problem(rng, 4, Range(9, 50) if rng.random() < 0.2 else span) for _ in range(problems)
    ]
    was_training = model.training
    model.eval()
    guesses = sample_guesses(model, drawn, mode, samples, rng.randrange(1 << 30))
    model.train(was_training)
    lessons = [
        lesson_of_guesses(problem, mode, rows, worth)
        for problem, rows in zip(drawn, guesses, strict=True)
    ]
    share = sum(lesson[2] for lesson in lessons) / len(lessons)
    return [lesson[0] for lesson in lessons], [lesson[1] for lesson in lessons], share
