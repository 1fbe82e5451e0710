"""Joins whose keys are turned, thousands of them and far out: they add no error of their own.

A model in float32 rounds the angle of each position (at 131,072 by 0.004), and that is all: float64
sums with these very angles give the same logits. At length:

    python tests/test_many_joins.py 10000 110000
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

import apr
from apr.soak.oracle import Oracle, Row, tiny_model

# Of the standard deviation of the logits. What float32 leaves of sums and of cosines: 8.1e-5 was
# seen over 10,000 joins.
BOUND = 1e-4


class OfRoundedAngles(Oracle):
    """With each position's angle rounded as the model rounds it, and turns between them exact."""

    def __init__(self, model):
        super().__init__(model)
        self.written: list[int] = []  # at which position each cell's token was written

    def _off(self, positions):
        exact = np.asarray(positions, np.float64)[..., None] * self._frequencies
        single = np.asarray(positions, np.float32)[..., None] * self._frequencies.astype("f4")
        return single.astype("f8") - exact

    def _angles(self, distance, sees, at):
        keys = self._off(np.asarray(self.written)[sees])
        return super()._angles(distance, sees, at) + keys - self._off(at)[:, None]


def joined(joins, base, oracle_kind=OfRoundedAngles, every=1):
    """(joins, how far its next logits are from the oracle's) of a thread that stands at `base`."""
    model = tiny_model()
    oracle = oracle_kind(model)
    oracle.written = []
    cells: list[int] = []
    places: list[int] = []

    def ran(token, at):
        oracle.written.append(at)
        number = len(oracle.written) - 1
        return oracle.run([Row(token, at, number, [*cells, number], [*places, at])])[0]

    with apr.Session(model, max_tokens=128 * (joins + 2), page_size=16) as s:
        head, tail = s.segment([1, 2, 3, 4]), s.region(base=base + 4)
        for i in range(4):  # written at 0, and read at `base`
            ran(1 + i, i)
            cells.append(i)
            places.append(i)
        places[:] = [base + i for i in range(4)]
        thread = s.thread(view=[(head, base), (tail, base + 4)], writes=tail)
        for n in range(joins):
            at, token = thread.position, n % 50
            (child,) = thread.fork(1)
            thread.extend([token])
            child.extend([token + 7])
            got = s.step([thread, child])[0].numpy()
            want = ran(token, at)
            ran(token + 7, at)
            cells += [len(oracle.written) - 2, len(oracle.written) - 1]
            places += [at, at + 1]  # the child's token is read behind the thread's own
            thread.join([child], positions="sum")
            assert thread.position == at + 2
            if n % every == 0 or n == joins - 1:
                yield n, float(np.abs(got - want).max() / want.std())


@pytest.mark.parametrize("base", [0, 131_072])
def test_joins_add_no_error(base):
    assert max(off for _, off in joined(200, base)) < BOUND


def test_the_angles_of_far_positions_have_power():
    """Without the model's own rounding the far thread is off, and the near one is not."""
    assert max(off for _, off in joined(40, 0, Oracle)) < BOUND
    assert max(off for _, off in joined(40, 131_072, Oracle)) > 10 * BOUND


if __name__ == "__main__":
    most, first = int(sys.argv[1]), int(sys.argv[2])
    for number, off in joined(most, first, every=max(1, most // 10)):
        print(f"{number + 1} joins, positions to {first + 4 + 2 * number}: {off:.1e}", flush=True)
