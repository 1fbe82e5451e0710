"""Packed forwards: rows of many threads in one call of the model, attending by a plan; a step of
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from apr import ops
from apr.errors import InvalidInput, NonFiniteLogits, UnsupportedModel
from apr.hf.cache_rows import CacheRows
from apr.hf.ranks import Ranks
from apr.hf.row_forward import forward_rows
from apr.hf.spec import SINKS, LayerSpec, ModelSpec
from apr.hf.vectors import PathVectors, RowVectors

if TYPE_CHECKING:
    from apr import _core
    from apr.hf.attachment import Attachment


def check_numbers(logits: Tensor, whose: Sequence[object] = ()) -> None:
    """Raise NonFiniteLogits where logits [rows, vocab] hold NaN or +inf, and say whose; it waits
    for the device.
    """
    best = logits.amax(-1)
    odd = best.isnan() | (best == float("inf"))
    if bool(odd.any()):
        rows, what = odd.nonzero()[:, 0].tolist(), "NaN" if bool(best.isnan().any()) else "+inf"
        named = ", ".join(repr(whose[row]) for row in rows[:4]) if whose else f"{len(rows)} rows"
        more = f" and {len(rows) - 4} others" if whose and len(rows) > 4 else ""
        raise NonFiniteLogits(
            f"step: the model returned {what} logits for {named}{more}; the step was taken back. "
            "Check the model's dtype and weights (float16 overflows where bfloat16 does not)"
        )


def out_of_table(furthest: int, error: IndexError) -> InvalidInput:
    """The exception for a token or position that the model has no embedding for."""
    return InvalidInput(
        f"step: the model has no embedding for a token or position of this step (positions up to "
        f"{furthest}): {error}; keep threads shorter"
    )


def changed(model: Any, how_many: str) -> UnsupportedModel:
    """The exception that says that a model does not do what it did when it was measured."""
    return UnsupportedModel(
        f"{type(model).__name__} made {how_many} attention calls than when it was measured: a "
        "module was replaced, or adapters were added, after it was attached; call "
        "session.refresh() (or cache.reset()), which releases its threads"
    )


class PackedForward:
    """Stores each layer's new keys and values and attends by the plan."""

    def __init__(
        self,
        attachment: Attachment,
        pools: Sequence[ops.Pool],
        plan: ops.Plan | None,
        vectors: RowVectors | None = None,
    ) -> None:
        self._spec, self._pools, self._plan = attachment.spec, pools, plan
        self.owner, self._linears = attachment.owner, attachment.linears()
        self._vectors = vectors
        self._next_layer = 0
        self.latent: Tensor | None = None

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("attention_mask")  # the 2-D padding or None; nothing dense is built

    def layer(self, model: Any) -> tuple[LayerSpec, ops.Pool]:
        if self._next_layer >= len(self._pools):
            raise changed(model, "more")
        self._next_layer += 1
        return self._spec.layers[self._next_layer - 1], self._pools[self._next_layer - 1]

    def attend_rows(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Any
    ) -> Tensor:
        """q [rows, heads, dim], k and v [rows, kv_heads, dim] -> [rows, heads, dim_v]."""
        assert self._plan is not None
        layer, pool = self.layer(module)
        if self._vectors is not None:
            k, v = self._vectors.add(self._next_layer - 1, k, v)
        given, stored = q.dtype, pool.dtype  # they differ under autocast
        ops.append(k.to(stored), v.to(stored), pool, self._plan)
        sinks = next((options[n] for n in SINKS if options.get(n) is not None), None)
        out, _ = ops.attention(
            q.to(stored),
            pool,
            self._plan,
            scale,
            layer.rotation,
            options.get("softcap"),
            sinks,
            window=layer.window,
            chunk=layer.chunk,
        )
        return out.to(given)

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor:
        kept, self.latent = self.latent, None
        linear = self._linears[self._next_layer] if self._next_layer < len(self._linears) else None
        if linear is None:
            return self.attend_lines(module, q, k, v, scale, options)
        latent = self._spec.layers[self._next_layer].latent
        assert latent is not None
        if kept is None:
            raise changed(module, "other")
        q, kept = latent.absorb(linear, kept, q, k)
        return latent.expand(linear, self.attend_lines(module, q, kept, kept, scale, options))

    def attend_lines(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Any
    ) -> Tensor:
        """q [lines, heads, tokens, head_dim], k and v likewise -> [lines, tokens, heads, dim_v]."""
        lines, _, length, _ = q.shape  # one line of all rows, or a line for each layer state
        if k.shape[2] != length:
            raise UnsupportedModel(
                f"{type(module).__name__} attends to {k.shape[2]} keys in a forward of {length} "
                "tokens: some are no token's"
            )
        if lines == 1:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return self.attend_rows(module, q, k, v, scale, options)[None]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = self.attend_rows(module, q, k, v, scale, options)
        return out.view(lines, length, *out.shape[1:])

    @property
    def is_complete(self) -> bool:
        """Whether every layer has made its call."""
        return self._next_layer == len(self._pools)

    def check_complete(self, model: Any) -> None:
        if not self.is_complete:
            raise changed(model, "fewer")


@dataclass
class Ran:
    """What a step ran, and the logits that it brought."""

    # Of each thread that waits for some: a tensor [rows, vocab], and which row of it.
    rows: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    num_rows: int = 0
    forwards: int = 0
    copied_tokens: int = 0
    plan_seconds: float = 0.0
    forward_seconds: float = 0.0
    choice_seconds: float = 0.0

    def check_finite(self, but: Collection[int] = ()) -> None:
        """Raise NonFiniteLogits for logits that hold NaN, but for those of some threads; infinite
        ones a processor may repair.
        """
        for tensor in {id(t): t for n, (t, _) in self.rows.items() if n not in but}.values():
            if bool(tensor.isnan().any()):
                check_numbers(tensor)


def keep_states(
    table: _core.ThreadTable, spec: ModelSpec, checkpoint_tokens: int
) -> CacheRows | None:
    """Where the layer states of a table's threads lie; None for a model that has none."""
    if spec.states is None:
        return None
    table.keep_states(checkpoint_tokens, spec.states.one_token)
    return CacheRows()


def run_step(
    step: _core.Step,
    attachment: Attachment,
    pools: Sequence[ops.Pool],
    invariant: bool = False,
    vectors: Mapping[int, PathVectors] | None = None,
    before_commit: Callable[[Ran], None] | None = None,
    held: CacheRows | None = None,
    ranks: Ranks | None = None,
) -> Ran:
    """Run a step's forwards one after the other and commit it; on any exception, of `before_commit`
    too, it is rolled back.
    """
    ran, began, ranks = Ran(), time.perf_counter(), ranks or Ranks()
    try:
        while step.next():
            with ranks.together(lambda: step.plan.digest):
                _run_forward(step, attachment, pools, invariant, vectors, held, ran)
        if before_commit is not None:
            before_commit(ran)
        step.commit()
    except BaseException:
        step.rollback()
        raise
    ran.copied_tokens = step.copied_tokens
    spent = ran.forward_seconds + ran.choice_seconds
    ran.plan_seconds = time.perf_counter() - began - spent
    return ran


def plan_of(step: _core.Step, pools: Sequence[ops.Pool], invariant: bool) -> ops.Plan:
    """The plan of a step's next forward, with the copies that it begins with made."""
    pages = (min(pool.num_pages for pool in pools), pools[0].page_size) if pools else None
    plan = ops.Plan(step.plan, invariant=invariant, pages=pages)
    for pool in pools if step.plan.num_copies else ():
        ops.copy_tokens(pool, plan)
    return plan


def _run_forward(
    step: _core.Step,
    attachment: Attachment,
    pools: Sequence[ops.Pool],
    invariant: bool,
    vectors: Mapping[int, PathVectors] | None,
    held: CacheRows | None,
    ran: Ran,
) -> None:
    if held is not None:
        held.drop_freed(step)
    plan = plan_of(step, pools, invariant)
    furthest = int(plan.core.positions.max())
    attachment.spec.check_step(furthest, plan.num_rows)
    if plan.turns:
        attachment.spec.check_turn(max(furthest, plan.core.furthest_view))
    wanted = step.logits_rows
    rows = sorted({row for _, row in wanted}) or [plan.num_rows - 1]  # as threads were given
    began = time.perf_counter()
    adds = (RowVectors(plan, vectors, attachment.spec) if vectors else None) or None
    if held is None:
        logits = attachment.forward(plan, rows, pools, adds)
        index = {row: i for i, row in enumerate(rows)}
    else:
        packed = PackedForward(attachment, pools, plan, adds)
        length = plan.num_rows // len(step.starts)
        columns = sorted({row % length for row in rows})
        try:
            lines, forwards = forward_rows(
                attachment, plan, packed, columns, held, step.starts, step.ends
            )
        except IndexError as error:
            raise out_of_table(int(plan.core.positions.max()), error) from error
        packed.check_complete(attachment.model)
        logits = lines.flatten(0, 1)
        width = len(columns)
        index = {row: row // length * width + columns.index(row % length) for row in rows}
        ran.forwards += forwards - 1
    ran.rows.update((number, (logits, index[row])) for number, row in wanted)
    ran.num_rows, ran.forwards = ran.num_rows + plan.num_rows, ran.forwards + 1
    ran.forward_seconds += time.perf_counter() - began
