"""Helpers of the core's tests: a small table, and a step without a model."""

from __future__ import annotations

from apr import _core

PAGE = 16
FAR_TOO_MANY = 1 << 40


def make(pages=4000, can_rotate=True):
    return _core.ThreadTable(pages, PAGE, can_rotate)


def step(table, ids, has_logits=False):
    transaction = _core.Step(table, ids, [has_logits] * len(ids), FAR_TOO_MANY)
    rows = 0
    while transaction.next():
        rows += transaction.plan.num_rows
    transaction.commit()
    return rows
