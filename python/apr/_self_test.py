"""Proves at attach time that a model's steps equal its stock forward, and that re-rotation holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apr.errors import UnsupportedModel

if TYPE_CHECKING:
    from apr.session import Session

# Largest logit difference that passes, in standard deviations of the stock logits. float32 differs by
# about 1e-6; half precision rounds every layer's output, in another order than the stock kernel.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


def _stock(session: Session, tokens: list[int]) -> Tensor:
    ids = torch.tensor([tokens], device=session.spec.device)
    with torch.no_grad():
        logits: Tensor = session.model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.float()


def self_test(session: Session) -> None:
    """Fork two ragged children in one packed step, then read a far-off segment; compare with stock.

    Raises UnsupportedModel when a plain fork differs: the model mixes tokens outside of attention (state
    spaces, convolutions), or derives positions by itself.
    """
    vocab = session.spec.vocab_size
    prefix = [(7 * i + 3) % vocab for i in range(9)]
    tails = [[(5 * i + 1) % vocab for i in range(3)], [(11 * i + 2) % vocab for i in range(1)]]
    want = torch.stack([_stock(session, prefix + tail) for tail in tails])
    scale = float(want.std().clamp_min(1e-6))
    tolerance = _TOLERANCE.get(session.spec.dtype, 2e-3)

    root = session.thread(prefix)
    children = root.fork(2)
    for child, tail in zip(children, tails, strict=True):
        child.extend(tail)
    got = session.step(children)
    error = float((got - want).abs().max()) / scale
    for thread in (*children, root):
        thread.release()
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{type(session.model).__name__} cannot be attached: two forked threads in one packed step "
            f"differ from their stock forwards by {error:.2g} standard deviations of the logits "
            f"(expected at most {tolerance:g}). The model mixes tokens outside of attention, or "
            "ignores position_ids; such models are not supported yet"
        )
    if not session.spec.can_rotate:
        return
    # The same tokens, written 40 positions further on, seen at the same place.
    first = session.segment(prefix)
    second = session.region(base=len(prefix) + 40)
    moved = session.thread(view=[(first, 0), (second, len(prefix))], writes=second)
    moved.extend(tails[0])
    error = float((session.step([moved])[0] - want[0]).abs().max()) / scale
    moved.release()
    if not error <= tolerance:
        raise UnsupportedModel(
            f"{type(session.model).__name__} cannot be attached: a segment read 40 positions from where "
            f"it was written changes the logits by {error:.2g} standard deviations (expected at most "
            f"{tolerance:g}), so the measured rotation does not describe this model"
        )
