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
from apr.hf.packed import Ran, keep_states, run_step
from apr.ops.pages import PAGE_SIZE

if TYPE_CHECKING:
    from apr.hf.attachment import Attachment

# Largest logit difference that passes, in standard deviations of the stock logits. float32 differs
# by about 1e-6; half precision rounds every layer's output, in another order than the stock kernel.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}

# The same where one computation is made twice, and only its company differs: no bit has to change
# in any format, and what is mixed up is 0.01 and more, with untrained weights too.
_SAME = 5e-3


def _stock(model: Any, tokens: list[int], device: torch.device) -> Tensor:
    """Logits [tokens, vocab]."""
    ids = torch.tensor([tokens], device=device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.to(device, torch.float32)


class _Bench:
    """A few pages, and threads on them: a session without what users hold."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        pages = 8
        self._pools = attachment.spec.make_pools(pages, PAGE_SIZE)
        self.table = _core.ThreadTable(pages, PAGE_SIZE, attachment.spec.can_rotate)
        self._held = keep_states(self.table, attachment.spec, 0)

    def step(self, threads: Sequence[_core.ThreadHandle]) -> Tensor:
        """Logits [threads, vocab]."""
        step = _core.Step(self.table, threads, [False] * len(threads), PAGE_SIZE)
        ran = run_step(
            step, self._attachment, self._pools, before_commit=Ran.check_finite, held=self._held
        )
        if self._held is not None:
            self._held.drop_freed(self.table)
        rows = [ran.rows[thread.number] for thread in threads]
        return torch.stack([tensor[row] for tensor, row in rows])


def self_test(attachment: Attachment, model: Any) -> None:
    """Fork two ragged children in one packed step, then read a far-off segment; compare with the
    stock forward of `model`, as the user wrapped it.

    Raises UnsupportedModel when a plain fork differs: the model mixes tokens outside of attention
    (state spaces, convolutions), or derives positions by itself.
    """
    spec, bench = attachment.spec, _Bench(attachment)
    vocab, name = spec.vocab_size, type(attachment.model).__name__
    states = spec.states
    # Long enough that what is kept by rows shows whether it is all; an index may keep less.
    long = states is not None and not states.chooses
    prefix = [(7 * i + 3) % vocab for i in range(40 if long else 9)]
    tails = [[(5 * i + 1) % vocab for i in range(3)], [(11 * i + 2) % vocab for i in range(1)]]
    rows = [_stock(model, prefix + tail, spec.device) for tail in tails]
    want = torch.stack([x[-1] for x in rows])
    scale = float(want.std().clamp_min(1e-6))
    tolerance = _TOLERANCE.get(spec.dtype, 2e-3)
    _check_causal(model, name, [*prefix, *tails[0]], rows[0], scale)
    if states is not None:
        _check_lengths(model, name, [*prefix, *tails[0]], rows[0], scale, tolerance)

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
            "ignores position_ids"
        )
    _check_company(bench, name, root, vocab, scale, apart=False)
    if states is not None:
        _check_company(bench, name, root, vocab, scale, apart=True)
    furthest = len(prefix) + 40 + len(tails[0])
    if not spec.can_rotate or any(x is not None and x <= furthest for x in spec.reach):
        return
    # The same tokens, written 40 positions further on, seen at the same place.
    first = bench.table.create_segment(prefix, 0, [])
    second = bench.table.create_region([], len(prefix) + 40, 1)
    view = [(first, 0, None, 0, False), (second, len(prefix), None, 0, False)]
    moved = bench.table.create_with_view(view, second, False, tails[0])
    error = float((bench.step([moved])[0] - want[0]).abs().max()) / scale
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be attached: a segment read 40 positions from where it was written "
            f"changes the logits by {error:.2g} standard deviations (expected at most "
            f"{tolerance:g}), so the measured rotation does not describe this model"
        )


def _check_causal(model: Any, name: str, tokens: list[int], rows: Tensor, scale: float) -> None:
    """Raise UnsupportedModel where what stands before a token changes with it."""
    other = (tokens[-1] + 1) % rows.shape[1]
    changed = _stock(model, [*tokens[:-1], other], rows.device)
    error = float((changed - rows)[:-1].abs().max()) / scale
    if not error <= _SAME:
        raise UnsupportedModel(
            f"{name} cannot be attached: its tokens see what stands behind them (another last "
            f"token changes the logits before it by {error:.2g} standard deviations); apr needs a "
            "causal language model. Is a setting such as is_decoder missing?"
        )


def _check_lengths(
    model: Any, name: str, tokens: list[int], rows: Tensor, scale: float, tolerance: float
) -> None:
    """Raise UnsupportedModel where logits change with how much stands behind: what is left out of
    attention then depends on the call.
    """
    shorter = _stock(model, tokens[:-3], rows.device)
    error = float((shorter - rows[:-3]).abs().max()) / scale
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{name} cannot be attached: its logits change by {error:.2g} standard deviations with "
            "how many tokens follow in the same call"
        )


def _check_company(
    bench: _Bench,
    name: str,
    root: _core.ThreadHandle,
    vocab: int,
    scale: float,
    apart: bool,
) -> None:
    """Raise UnsupportedModel where a thread's logits change with where in a step it stands, or,
    with `apart`, in which of two steps.

    This has power in half precision, where a comparison with the stock forward has little: the same
    sums are made, in the same order.
    """
    texts = [[(3 * i + 1) % vocab for i in range(3)], [(11 * i + 2) % vocab for i in range(3)]]

    def run(order: list[int]) -> Tensor:
        children = bench.table.fork(root, 2)
        for child, text in zip(children, texts, strict=True):
            bench.table.extend(child, text)
        parts = [[children[i]] for i in order] if apart else [[children[i] for i in order]]
        logits = torch.cat([bench.step(part) for part in parts])
        for child in children:
            bench.table.release(child)
        return logits[order]

    first, swapped = run([0, 1]), run([1, 0])
    error, allowed = float((swapped - first).abs().max()) / scale, _SAME
    if not error <= allowed:  # kernels that sum in no fixed order differ from themselves
        allowed = max(_SAME, 4 * float((run([0, 1]) - first).abs().max()) / scale)
    if not error <= allowed:
        raise UnsupportedModel(
            f"{name} cannot be attached: two forked threads that change places in a packed step "
            f"change their logits by {error:.2g} standard deviations (expected at most "
            f"{allowed:.1g}). The model mixes tokens outside of attention, or ignores position_ids"
        )
