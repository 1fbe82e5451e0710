"""The soak finds what is wrong: its oracle beside the stock model, and faults that are put in."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import apr
from apr import soak
from apr.soak.oracle import Oracle, Row, tiny_model
from apr.soak.plain import World
from apr.soak.steps import Player
from models import distance


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_the_oracle_is_the_stock_model(model):
    ids = random.Random(0).choices(range(64), k=30)
    rows = [Row(t, i, i, range(i + 1), range(i + 1)) for i, t in enumerate(ids)]
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    oracle = Oracle(model)
    parts = [oracle.run(rows[:11]), oracle.run(rows[11:])]
    assert distance(torch.cat([torch.from_numpy(part) for part in parts]), want) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_sessions_do_as_the_oracle_says(model, seed):
    tally = soak.play(soak.program(seed, 400, faults=0.15), model)
    assert tally.rows > 100 and tally.worst < 1e-4
    assert sum(tally.operations.values()) == 400 and tally.faults


def failing(model, tries=40):
    """The first program of some that fails, and how."""
    for seed in range(tries):
        operations = soak.program(seed, 200, faults=0.0)
        try:
            soak.play(operations, model)
        except soak.Failure as error:
            return operations, error
    return None, None


def test_a_wrong_place_after_a_join_is_found_and_made_small(model, monkeypatch):
    """Where the plain lists say "side by side", the session puts one after the other."""
    right = apr.Thread.join

    def wrong(self, children, positions="max", reencode=False):
        right(self, children, "sum" if positions == "max" else positions, reencode)

    monkeypatch.setattr(apr.Thread, "join", wrong)
    operations, error = failing(model)
    assert "is at" in str(error)

    def fails(some):
        try:
            soak.play(some, model)
        except soak.Failure:
            return True
        return False

    small = soak.shrink(operations, fails, seconds=30)
    assert len(small) <= 12 and small[-1][0] == "join"
    assert all(fails([op for op in small if op is not left]) is False for left in small)
    text = soak.script(small)
    assert "replay([" in text
    with pytest.raises(soak.Failure):
        exec(text)


def test_logits_under_another_view_are_found(model, monkeypatch):
    """Plain lists that leave out one of the tokens that a forked child sees."""
    right = World.fork

    def wrong(self, number, children):
        right(self, number, children)
        for child in children:
            line = self.lines[child]
            line.items = [(c, at + (i == 0)) for i, (c, at) in enumerate(line.items)]

    monkeypatch.setattr(World, "fork", wrong)
    _, error = failing(model)
    assert "standard deviations off" in str(error)


def test_calls_with_any_arguments_end_no_process():
    """A few of those of `make reliability`; some must return, or nothing was tried."""
    script = Path(__file__).parent.parent / "tools" / "fuzz.py"
    command = [sys.executable, str(script), "--calls", "5000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "processes that ended: 0" in done.stdout, done.stderr
    assert int(re.search(r"returned (\d+)", done.stdout)[1]) > 500


def test_what_stays_is_found(model, monkeypatch):
    kept = []
    right = Player.do_thread

    def keeps(self, *numbers):
        kept.append(self.session.region([1]))
        right(self, *numbers)

    monkeypatch.setattr(Player, "do_thread", keeps)
    _, error = failing(model)
    assert "pages, threads, segments that stay: (0, 0, " in str(error)
