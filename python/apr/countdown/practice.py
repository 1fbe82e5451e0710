"""A light reinforcement phase: the model practises its own guesses, and learns when one is worth
its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apr.countdown.lessons import draw_problem, encode, prompt
from apr.countdown.problems import Problem, Range, format_chain, verify
from apr.countdown.search import a_solution
from apr.countdown.tokenizer import WORDS
from apr.protocols.record import Record
from apr.training import Flat, flatten

_CHAIN = 12  # words of a guess over four numbers
_SHOWN = 0.3  # weight of a solution that is shown after a miss, beside the model's own tries


@torch.no_grad()
def sample_tries(
    model: Any,
    problems: Sequence[Problem],
    modes: Sequence[str],
    samples: int,
    tries: int,
    seed: int,
) -> Tensor:
    """Tries [problems, samples, tries, 12] of token ids, at temperature 1, as if each had
    missed.
    """
    device = next(model.parameters()).device
    prompts = [prompt(p, mode) for p, mode in zip(problems, modes, strict=True)]
    ids = torch.tensor([encode([*text.split(), "<try>"]) for text in prompts])
    step = ids.to(device).repeat_interleave(samples, 0)
    again = torch.tensor(encode(["<miss>", "<try>"]), device=device).expand(len(step), 2)
    generator = torch.Generator(device).manual_seed(seed)
    cache, written = None, []
    for place in range(tries * _CHAIN):
        if place and place % _CHAIN == 0:
            step = torch.cat([step, again], 1)
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        written.append(step)
    return torch.cat(written, 1).view(len(problems), samples, tries, _CHAIN).cpu()


@dataclass
class Weighed:
    """A record with a weight for each of its sampled tokens, in the order of `flatten`'s
    targets.
    """

    record: Record = field(default_factory=Record)
    weights: list[list[float]] = field(default_factory=list)  # of each piece

    def after(self, piece: int, hi: int | None = None) -> int:
        self.weights.append([])
        return self.record.after(piece, hi)

    def put_in(self, piece: int, words: Sequence[str]) -> None:
        self.record.write(piece, encode(words), sampled=False)

    def teach(self, piece: int, words: Sequence[str], weight: float) -> None:
        self.record.write(piece, encode(words), sampled=True)
        self.weights[piece] += [weight] * len(words)

    def flat(self) -> tuple[Flat, list[float]]:
        return flatten(self.record), [w for piece in self.weights for w in piece]


def lesson_of_tries(
    problem: Problem, mode: str, rows: Tensor, worth: float, rng: random.Random
) -> tuple[Flat, list[float], list[float]]:
    """The flat lesson, a weight for each of its targets, and the share of right guesses of each
    try.

    Words of a guess weigh its advantage: right (1) or wrong (0) less the mean over the samples that
    came so far, as in GRPO (arXiv 2402.03300) without its scale. Verdicts are taught as they should
    have been, and whether to try, or to try again, by the share of right ones among all tries:
    below `worth`, a guess costs more tokens of the critical path than it saves. After a miss a
    solution is shown too.
    """
    lesson, samples = Weighed(), len(rows)
    lesson.weights.append([])
    root = lesson.record.start(encode(prompt(problem, mode).split()))
    said = [[[WORDS[i] for i in guess] for guess in row] for row in rows.tolist()]
    rights = [[verify(problem, " ".join(guess)) for guess in row] for row in said]
    search = "<spawn>" if mode == "parallel" else "#"
    here = [(root, len(lesson.record.pieces[root].ids))] * samples
    made = [row.index(True) + 1 if True in row else len(row) for row in rights]
    decision = "<try>" if sum(map(any, rights)) / sum(made) >= worth else search
    left, shares = list(range(samples)), []
    for k in range(len(said[0])):
        share = sum(rights[i][k] for i in left) / len(left)
        shares.append(share)
        for i in left if k else left[:1]:  # before the first try all samples are one
            lesson.teach(lesson.after(*here[i]), [decision], 1.0 / (len(left) if k else 1))
        if k:
            piece = lesson.after(*here[left[0]])
            lesson.put_in(piece, ["<try>"])
            solution = a_solution(problem.numbers, problem.target, rng)
            lesson.teach(piece, format_chain(solution).split(), _SHOWN)
        for i in left:
            piece = lesson.after(*here[i])
            lesson.put_in(piece, ["<try>"])
            lesson.teach(piece, said[i][k], rights[i][k] - share)
            lesson.teach(piece, ["<ok>", "<eos>"] if rights[i][k] else ["<miss>"], 1.0 / samples)
            here[i] = (piece, len(lesson.record.pieces[piece].ids))
        left = [i for i in left if not rights[i][k]]
        if not left:
            break
    else:
        for i in left:
            lesson.teach(lesson.after(*here[i]), [search], 1.0 / samples)
    return *lesson.flat(), shares


def practice(
    model: Any,
    step: int,
    seed: int,
    span: Range,
    problems: int,
    samples: int,
    tries: int,
    worth: float,
) -> tuple[list[Flat], list[list[float]], float]:
    """Lessons on the model's own tries for one step, their weights, and the share of right first
    ones.
    """
    rng = random.Random(f"{seed}/practice/{step}")
    drawn = [
        draw_problem(rng, 4, Range(9, 50) if rng.random() < 0.2 else span) for _ in range(problems)
    ]
    # Both modes in every step: a step of one alone would pull the other's decisions along.
    modes = [("parallel", "sequential")[i % 2] for i in range(problems)]
    was_training = model.training
    model.eval()
    rows = sample_tries(model, drawn, modes, samples, tries, rng.randrange(1 << 30))
    model.train(was_training)
    lessons = [
        lesson_of_tries(problem, mode, own, worth, rng)
        for problem, mode, own in zip(drawn, modes, rows, strict=True)
    ]
    share = sum(lesson[2][0] for lesson in lessons) / len(lessons)
    return [lesson[0] for lesson in lessons], [lesson[1] for lesson in lessons], share
