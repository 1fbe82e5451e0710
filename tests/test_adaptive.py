"""The adaptive Countdown model: its search space, lessons that are what the runtime does, its
training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apr
from apr import countdown, hf
from apr.countdown import search, train_adaptive, training_run
from apr.countdown.lessons import (
    EASY,
    HARD,
    draw_problem,
    encode,
    guesses_record,
    parallel_record,
    prompt,
    sequential_record,
)
from apr.countdown.practice import lesson_of_tries, sample_tries
from apr.countdown.problems import Problem, Range, apply, format_chain, is_held_out, verify
from apr.countdown.solve import GRAMMAR, answer_of, solve
from apr.countdown.tokenizer import WORDS, build_tokenizer
from apr.protocols.replays import replay
from apr.training import flatten
from models import random_weights

numbers = st.lists(st.integers(1, 20), min_size=2, max_size=4).map(
    lambda x: tuple(sorted(x, reverse=True))
)


def brute_force(pool):
    """Every chain of the space, by trying all ordered pairs; the slow way round."""
    if len(pool) == 1:
        yield ()
        return
    done = set()
    for i, j in itertools.permutations(range(len(pool)), 2):
        left, right = pool[i], pool[j]
        for operator in "+-*/":
            result = apply(left, operator, right)
            if result is None or not 1 <= result <= search.LARGEST_RESULT or left < right:
                continue
            if operator in "*/" and right == 1:
                continue
            step = (left, operator, right, result)
            if step in done:
                continue
            done.add(step)
            rest = [n for k, n in enumerate(pool) if k not in (i, j)]
            for tail in brute_force([*rest, result]):
                yield (step, *tail)


@settings(max_examples=40, deadline=None)
@given(numbers)
def test_the_space_against_brute_force(pool):
    chains = list(brute_force(list(pool)))
    counts = search.solution_counts(pool)
    for target in {c[-1][3] for c in chains}:
        mine = [c for c in chains if c[-1][3] == target]
        assert counts[target] == len(mine)
        first = search.first_solution(pool, target)
        assert first in mine
        assert search.a_solution(pool, target, random.Random(0)) in mine
        assert verify(Problem(pool, target), format_chain(first))
    assert search.a_chain(pool, random.Random(1)) in chains
    for number, step, after in search.edges(pool):
        assert 0 <= number < 24 and sorted(after, reverse=True) == list(after)
        assert step[3] in after


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=3), st.integers(10, 100))
def test_a_body_finds_a_solution_if_there_is_one(pool, target):
    pool = tuple(sorted(pool, reverse=True))
    words, chain = search.body(pool, target)
    assert (chain is not None) == (search.solution_counts(pool)[target] > 0)
    if chain is not None:
        assert verify(Problem(pool, target), format_chain(chain))
        assert words[-1] == str(target)
    assert all(w in WORDS for w in words)


def test_strata_and_split_are_fixed():
    assert (HARD, EASY) == (2, 9)
    rng = random.Random(3)
    for _ in range(50):
        assert not is_held_out(draw_problem(rng, 4, Range(20, 100)).numbers)
        assert is_held_out(draw_problem(rng, 4, Range(9, 50), held_out=True).numbers)
    recipe = train_adaptive.Lessons(trees=3, deep_trees=1, lines=3, guesses=3)
    for step in range(5):
        for flat in train_adaptive.draw_lessons(recipe, step):
            words = [WORDS[i] for i in flat.ids.tolist()]
            first = words[words.index(":") + 1 :]
            given_numbers = tuple(int(w) for w in itertools.takewhile(str.isdigit, first))
            assert not is_held_out(given_numbers)


@pytest.fixture(scope="module")
def tiny():
    """An untrained model over the Countdown words: what it says is scripted."""
    model = train_adaptive.build_model(dataclasses.replace(train_adaptive.SMOKE, layers=2))
    return random_weights(model), build_tokenizer()


def scripts(problem, miss):
    """What a perfect model writes, from the space alone: of every thread by its path."""
    script = {(): ["<try>", *format_chain(miss).split(), "<miss>", "<spawn>"]}
    steps = search.edges(problem.numbers)
    script[()] += [f"e{number}" for number, _, _ in steps] + ["<join>", "<eos>"]
    for n, (_, (left, operator, right, result), after) in enumerate(steps, 1):
        words = [str(left), operator, str(right), str(result), ":", *map(str, after)]
        searched, rest = search.body(after, problem.target)
        words += searched
        if rest is None:
            words += ["<none>"]
        else:
            chain = ((left, operator, right, result), *rest)
            words += ["<found>", *format_chain(chain).split()]
        script[((0, n),)] = [*words, "<eos>"]
    return {path: encode(words) for path, words in script.items()}


@pytest.mark.parametrize("seed", range(4))
def test_lessons_are_what_the_runtime_does(seed, tiny):
    """A perfect model, run under the grammar, and the lesson on it: the same tokens at the same
    places.
    """
    model, tokenizer = tiny
    rng = random.Random(seed)
    problem = draw_problem(rng, 4, Range(20, 100))
    while search.solutions(problem) <= HARD:
        problem = draw_problem(rng, 4, Range(20, 100))
    lesson = parallel_record(problem, rng, children=6)
    tried = next(p for p in lesson.pieces if WORDS[p.ids[0]] == "<try>" and "<miss>" in words_of(p))
    said = words_of(tried)[1:13]
    miss = tuple(
        (int(said[i]), said[i + 1], int(said[i + 2]), int(said[i + 3])) for i in range(0, 12, 4)
    )
    with apr.Session(model, max_tokens=1 << 14, page_size=16) as session:
        thread = session.thread(tokenizer(prompt(problem)).input_ids)
        played = replay(session, thread, GRAMMAR, scripts(problem, miss), tokenizer=tokenizer)
        outcome = played.outcome
    assert verify(problem, answer_of(outcome.text)) and outcome.finish == "eos"
    # The parent: prompt and answer as in the lesson, but for the winner, which the lesson draws.
    record = outcome.record
    mine, theirs = words_of(record.pieces[0]), ["<bos>", *words_of(lesson.pieces[0])[1:]]
    until = mine.index("<join>") + 2
    assert mine[:until] == [*theirs, *words_of(tried)][:until]
    assert mine[until - 1] == "<found>" and mine[-1] == "<eos>"
    # Every child of the lesson: at the same positions, seeing the same tokens, writing the same.
    children = {tuple(words_of(record.pieces[b.pieces[0]])[:2]): b for b in outcome.root.children}
    checked = 0
    for piece in lesson.pieces:
        words = words_of(piece)
        if words[0] != "#":
            continue
        branch = children[tuple(words[:2])]
        ran = record.pieces[branch.pieces[0]]
        assert ran.position == piece.position
        assert visible(record, ran) == visible(lesson, piece)
        assert words_of(ran) == words[: len(ran.ids)]  # cancelled ones stop early
        assert branch.finish == "cancelled" or words_of(ran) == words
        assert ran.sampled == piece.sampled[: len(ran.ids)]
        checked += 1
    assert checked >= 2


def words_of(piece):
    return [WORDS[i] for i in piece.ids]


def visible(record, piece):
    return [i for part in piece.sees for i in record.pieces[part.piece].ids[: part.hi]]


@pytest.mark.parametrize("count", [4, 5])
def test_lessons_replay_by_arithmetic(count):
    rng = random.Random(count)
    for _ in range(30):
        problem = draw_problem(rng, count, Range(20, 100))
        records = [parallel_record(problem, rng), guesses_record(problem, rng)]
        if count == 4:
            records.append(sequential_record(problem, rng))
        for record in records:
            flatten(record)  # every sampled token has a source
            for piece in record.pieces:
                words = words_of(piece)
                if words[-2:] == ["<ok>", "<eos>"]:
                    assert verify(problem, " ".join(words[words.index("<try>") + 1 : -2]))
                if "<found>" in words and "#" not in words and words[-1] == "<eos>":
                    found = words[len(words) - 1 - words[::-1].index("<found>") + 1 : -1]
                    assert verify(problem, " ".join(found))


def test_practice_weighs_what_arithmetic_says():
    """Four samples of two tries: one right at once, one at the second try, two never."""
    problem = Problem((8, 6, 4, 2), 24)
    right = format_chain(search.first_solution(problem.numbers, 24)).split()
    wrong = ["8", "+", "6", "14", "14", "+", "4", "18", "18", "+", "2", "20"]
    lying = [
        "8",
        "+",
        "6",
        "14",
        "14",
        "+",
        "4",
        "18",
        "18",
        "+",
        "2",
        "24",
    ]  # the target, by false arithmetic
    stray = ["<eos>"] * 12
    samples = [(right, wrong), (wrong, right), (lying, stray), (stray, wrong)]
    rows = torch.tensor([[encode(words) for words in sample] for sample in samples])
    # Two of the four samples are right in the end, with seven tries in all.
    for worth, decision in ((0.28, "<try>"), (0.29, "<spawn>")):
        flat, weights, shares = lesson_of_tries(problem, "parallel", rows, worth, random.Random(0))
        assert shares == [0.25, pytest.approx(1 / 3)] and len(weights) == len(flat.targets)
        taught: dict[int, list] = {}
        for place, weight in zip(flat.targets.tolist(), weights, strict=True):
            word = WORDS[int(flat.ids[place])]
            taught.setdefault(int(flat.piece[place]), []).append((word, weight))
        parts = list(taught.values())
        assert parts[0] == [(decision, 1.0)]
        guesses = [p for p in parts if len(p) > 12]
        assert [[w for w, _ in p[:12]] for p in guesses] == [
            right,
            wrong,
            lying,
            stray,
            right,
            stray,
            wrong,
        ]
        for part, share in zip(guesses, [0.25] * 4 + [1 / 3] * 3, strict=True):
            words = [w for w, _ in part]
            hit = words[:12] == right
            assert all(w == pytest.approx(hit - share) for _, w in part[:12])
            assert words[12:] == (["<ok>", "<eos>"] if hit else ["<miss>"])
            assert all(w == 0.25 for _, w in part[12:])
        # After a miss the same decision again; in the end, to search.
        decisions = [p for p in parts[1:] if len(p) == 1]
        assert decisions == [[(decision, 1 / 3)]] * 3 + [[("<spawn>", 0.25)]] * 2
        shown = [p for p in parts if len(p) == 12]
        assert len(shown) == 1 and verify(problem, " ".join(w for w, _ in shown[0]))


def test_tries_are_drawn_from_the_model(tiny):
    """Each try, after the misses before it: the model's own distribution on the whole line."""
    model, _ = tiny
    problems = [Problem((8, 6, 4, 2), 24), Problem((9, 5, 3, 1), 30)]
    modes = ["parallel", "sequential"]
    tries = sample_tries(model, problems, modes, 3, 2, seed=1)
    assert tries.shape == (2, 3, 2, 12)
    assert torch.equal(tries, sample_tries(model, problems, modes, 3, 2, seed=1))
    assert not torch.equal(tries[:, 0], tries[:, 1])
    # The same draws from stock forwards of the whole lines, without a cache.
    generator, rows = torch.Generator().manual_seed(1), []
    for problem, mode in zip(problems, modes, strict=True):
        rows += [encode([*prompt(problem, mode).split(), "<try>"])] * 3
    line = torch.tensor(rows)
    for place in range(24):
        if place == 12:
            again = torch.tensor(encode(["<miss>", "<try>"])).expand(6, 2)
            line = torch.cat([line, again], 1)
        with torch.no_grad():
            last = model(line).logits[:, -1].float().softmax(-1)
        line = torch.cat([line, torch.multinomial(last, 1, generator=generator)], 1)
    drawn = torch.cat([line[:, -26:-14], line[:, -12:]], 1).view(2, 3, 2, 12)
    assert torch.equal(tries, drawn)


def test_training_resumes_to_the_same_model(tmp_path):
    recipe = dataclasses.replace(train_adaptive.SMOKE, steps=4)
    list(train_adaptive.train(recipe, tmp_path / "whole", report_every=2))
    run = train_adaptive.train(recipe, tmp_path / "parts", report_every=2)
    next(run)
    next(run)
    run.close()  # interrupted where practice begins
    list(train_adaptive.train(recipe, tmp_path / "parts", report_every=2))
    one, _ = hf.load(str(tmp_path / "whole"))
    two, _ = hf.load(str(tmp_path / "parts"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["command"] == "python -m apr train countdown"
    assert [row["step"] for row in record["curve"]] == [2, 4, 6]


@pytest.fixture(scope="module")
def shipped():
    return hf.load(str(countdown.ADAPTIVE), dtype=torch.float32)


def test_the_shipped_model_decides_by_itself(shipped):
    """What docs/adaptive.md says of fresh held-out problems, within four standard errors of 60 hard
    and 60 easy.
    """
    model, tokenizer = shipped
    rng = random.Random(99)
    hard, easy = [], []
    while len(hard) < 60 or len(easy) < 60:
        problem = draw_problem(rng, 4, Range(20, 100), held_out=True)
        count = search.solutions(problem)
        stratum = hard if count <= HARD else easy if count >= EASY else []
        if len(stratum) < 60:
            stratum.append(problem)
    with apr.Session(model, max_tokens=1 << 17, page_size=16) as session:
        found = {"hard": solve(session, tokenizer, hard), "easy": solve(session, tokenizer, easy)}
        assert session.stats.used_pages == 0

    def share(stratum, what):
        return sum(what(s) for s in found[stratum]) / len(found[stratum])

    for stratum in found:
        assert share(stratum, lambda s: s.right) > 0.97 - 4 * (0.97 * 0.03 / 60) ** 0.5
    spawns = {name: share(name, lambda s: s.outcome.threads > 0) for name in found}
    assert spawns["hard"] > 0.9 - 4 * (0.9 * 0.1 / 60) ** 0.5
    assert spawns["easy"] < spawns["hard"] - 0.2
    children = {name: share(name, lambda s: s.outcome.threads) for name in found}
    assert children["hard"] > 1.3 * children["easy"]


def test_five_numbers_nest_within_their_budget(shipped):
    model, tokenizer = shipped
    rng = random.Random(5)
    problems = []
    while len(problems) < 4:
        problem = draw_problem(rng, 5, Range(20, 100), held_out=True)
        if search.solutions(problem) <= HARD:  # so that it does not get away with a guess
            problems.append(problem)
    budget = apr.Budget(threads=32, depth=2, tokens=8000, tokens_per_thread=600)
    with apr.Session(model, max_tokens=1 << 17, page_size=16) as session:
        found = solve(session, tokenizer, problems, budget=budget)
        assert session.stats.used_pages == 0
    assert all(s.outcome.total_tokens < 8000 + 32 for s in found)
    assert max(s.outcome.depth for s in found) == 2
    shallow = dataclasses.replace(budget, depth=1)
    with apr.Session(model, max_tokens=1 << 17, page_size=16) as session:
        found = solve(session, tokenizer, problems, budget=shallow)
    assert max(s.outcome.depth for s in found) == 1


@pytest.mark.parametrize(
    "shape", [(50, 5, 8), (50, 10, 0), (4, 2, 2), (20, 100, 3), (0, 0, 5), (9, 0, 0)]
)
@pytest.mark.parametrize("first", [0, 3])
def test_the_learning_rate_is_that_of_its_step(shape, first):
    """Against the formula, from any step on, whatever the optimiser was left with."""
    steps, warmup, practice = shape
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = 7.0
    recipe = dataclasses.replace(train_adaptive.Lessons(), steps=steps, warmup=warmup)
    rates = training_run.schedule(optimizer, recipe, first, practice, 0.2)
    for step in range(first, steps + practice):
        done = (step - warmup) / max(1, steps - warmup)
        want = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        if step < warmup:
            want = (step + 1) / warmup
        if step >= steps:
            want = 0.2 * (1 - (step - steps) / practice)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * want, rel=1e-9, abs=1e-12)
        optimizer.step()
        rates.step()
