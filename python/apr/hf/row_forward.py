"""Forwards of lines that each go on from a layer state: a row of the model's batch for a line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apr import ops
from apr.errors import Error, UnsupportedModel
from apr.hf.cache_rows import CacheRows
from apr.hf.interface import own_attention, own_mask
from apr.hf.layer_states import run
from apr.hf.probe import chosen_keys
from apr.ops import device as gpu

if TYPE_CHECKING:
    from apr.hf.attachment import Attachment
    from apr.hf.packed import PackedForward


_ANYHOW: AbstractContextManager[Any] = nullcontext()


class KeepsAll:
    """Lets a model attend by itself while its sparse index leaves no key out.

    Past that the stock model disagrees with itself: which keys are kept depends on what else is in
    a call.
    """

    def __init__(self, owner: frozenset[int]) -> None:
        self.owner = owner
        self.latent: Tensor | None = None

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor:
        chosen = chosen_keys(options)
        if chosen is not None and chosen.shape[-1] < k.shape[2]:
            raise UnsupportedModel(
                f"step: a thread sees {k.shape[2]} tokens, of which this model's sparse index "
                f"keeps {chosen.shape[-1]}; keep threads that short"
            )
        out: Tensor = own_attention(module)(module, q, k, v, mask, scaling=scale, **options)[0]
        return out

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        return own_mask(*args, **kwargs)


def forward_rows(
    attachment: Attachment,
    plan: ops.Plan,
    packed: PackedForward,
    columns: list[int],
    held: CacheRows,
    starts: Sequence[int],
    ends: Sequence[int],
) -> tuple[Tensor, int]:
    """Run the plan's rows as [lines, L]; logits [lines, len(columns), vocab], unchecked, and the
    number of forwards that it took.

    starts and ends: the state that each line begins with, -1 at the beginning of a text, and the
    one that it leaves, -1 where nobody wants it.
    """
    spec = attachment.spec
    assert spec.states is not None
    ids = gpu.uploaded(plan.core.ids, spec.device).view(len(starts), -1)
    positions = gpu.uploaded(plan.core.positions, spec.device).view(ids.shape)
    groups = held.groups(starts)
    if spec.states.attends and len(groups) > 1:
        raise Error("step: layer states of several kinds in one forward; please report this")
    found: dict[int, Tensor] = {}
    for group in groups:
        first = starts[group[0]]
        cache = None if first < 0 else held.gather([starts[i] for i in group])
        more: dict[str, Any] = {}
        if spec.keeps_rows:
            more["logits_to_keep"] = spec.rows_to_keep(columns)
        if spec.states.attends and spec.takes_positions:
            more["position_ids"] = positions
        part = ids if len(groups) == 1 else ids[gpu.uploaded(group, spec.device)]
        call, eager = attachment.call, _ANYHOW
        if spec.states.chooses:  # in a compiled model an index's numbers do not reach KeepsAll
            call, eager = attachment.model, torch.compiler.set_stance("force_eager")
        with attachment.running(packed), eager:
            logits, after = run(call, spec.states, cache, part, **more)
        logits = logits.to(spec.device)
        if not spec.keeps_rows:
            logits = logits[:, gpu.uploaded(columns, logits.device)]
        found.update(zip(group, logits, strict=True))
        wanted = [ends[i] if ends[i] >= 0 else None for i in group]
        if any(end is not None for end in wanted):
            held.put(wanted, after)
    if len(groups) > 1:
        logits = torch.stack([found[i] for i in range(len(starts))])
    return logits, len(groups)
