"""Proves at attach time that a model's steps equal its stock forward, and that re-rotation
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apr import _core
from apr.errors import UnsupportedModel
from apr.hf.packed import Ran, run_step
from apr.ops.pages import PAGE_SIZE

if TYPE_CHECKING:
    from apr.hf.attachment import Attachment

# Largest logit difference that passes, in standard deviations of the stock logits. float32 differs
# by about 1e-6; half precision rounds every layer's output, in another order than the stock kernel.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


def _stock(model: Any, tokens: list[int], device: torch.device) -> Tensor:
    ids = torch.tensor([tokens], device=device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.float()


class _Bench:
    """A few pages, and threads on them: a session without what users hold."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        pages = 8
        self._pools = attachment.spec.make_pools(pages, PAGE_SIZE)
        self.table = _core.ThreadTable(pages, PAGE_SIZE, attachment.spec.can_rotate)

    def step(self, threads: Sequence[int]) -> Tensor:
        """Logits [threads, vocab]."""
        step = _core.Step(self.table, threads, [False] * len(threads), PAGE_SIZE)
        ran = run_step(step, self._attachment, self._pools, before_commit=Ran.check_finite)
        return torch.stack([ran.rows[thread][0][ran.rows[thread][1]] for thread in threads])


def self_test(attachment: Attachment, model: Any) -> None:
    """Fork two ragged children in one packed step, then read a far-off segment; compare with the
    stock forward of `model`, as the user wrapped it.

    Raises UnsupportedModel when a plain fork differs: the model mixes tokens outside of attention
    (state spaces, convolutions), or derives positions by itself.
    """
    spec, bench = attachment.spec, _Bench(attachment)
    vocab, name = spec.vocab_size, type(attachment.model).__name__
    prefix = [(7 * i + 3) % vocab for i in range(9)]
    tails = [[(5 * i + 1) % vocab for i in range(3)], [(11 * i + 2) % vocab for i in range(1)]]
    want = torch.stack([_stock(model, prefix + tail, spec.device) for tail in tails])
    scale = float(want.std().clamp_min(1e-6))
    tolerance = _TOLERANCE.get(spec.dtype, 2e-3)

    root = bench.table.create(prefix)
    children = bench.table.fork(root, 2)
    for child, tail in zip(children, tails, strict=True):
        bench.table.extend(child, tail)
    error = float((bench.step(children) - want).abs().max()) / scale
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be attached: two forked threads in one packed step "
            f"differ from their stock forwards by {error:.2g} standard deviations of the logits "
            f"(expected at most {tolerance:g}). The model mixes tokens outside of attention, or "
            "ignores position_ids; such models are not supported yet"
        )
    if not spec.can_rotate:
        return
    # The same tokens, written 40 positions further on, seen at the same place.
    first = bench.table.create_segment(prefix, 0, [])
    second = bench.table.create_region([], len(prefix) + 40, 1)
    view = [(first, 0, None, 0, False), (second, len(prefix), None, 0, False)]
    moved = bench.table.create_with_view(view, second, False)
    bench.table.extend(moved, tails[0])
    error = float((bench.step([moved])[0] - want[0]).abs().max()) / scale
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be attached: a segment read 40 positions from where it was written "
            f"changes the logits by {error:.2g} standard deviations (expected at most "
            f"{tolerance:g}), so the measured rotation does not describe this model"
        )
