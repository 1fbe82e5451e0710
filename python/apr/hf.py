"""Attaches a model: measures it, runs packed forwards through the registered attention."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from apr import gpu, ops
from apr.errors import InvalidInput, NonFiniteLogits, UnsupportedModel
from apr.interface import Running
from apr.model_state import Watch, known, structure, undisturbed, unwrap
from apr.probe import SINKS, LayerSpec, ModelSpec, measure
from apr.vectors import PathVectors, RowVectors

if TYPE_CHECKING:
    from apr import _core


def load(path: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or hub id."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise InvalidInput(f"model {path!r} cannot be loaded: {error}") from error


def check_finite(logits: Tensor) -> None:
    """Raise NonFiniteLogits where a forward returned no numbers; waits for the device."""
    if bool(logits.isnan().any()):
        raise NonFiniteLogits(
            "step: the model returned NaN logits; the step was taken back. Check the "
            "model's dtype and weights (float16 overflows where bfloat16 does not)"
        )


def changed(model: Any, how_many: str) -> UnsupportedModel:
    """The exception that says that a model does not do what it did when it was measured."""
    return UnsupportedModel(
        f"{type(model).__name__} made {how_many} attention calls than when it was measured: a module was "
        "replaced, or adapters were added, after it was attached; call session.refresh() (or "
        "cache.reset()), which releases its threads"
    )


class PackedForward:
    """Stores each layer's new keys and values and attends by the plan."""

    def __init__(
        self,
        spec: ModelSpec,
        pools: Sequence[ops.Pool],
        plan: ops.Plan | None,
        owner: frozenset[int],
        vectors: RowVectors | None = None,
    ) -> None:
        self._spec, self._pools, self._plan, self.owner = spec, pools, plan, owner
        self._vectors = vectors
        self._next_layer = 0

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
        given, stored = q.dtype, pool.k.dtype  # they differ under autocast
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
        rows = (q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1))
        return self.attend_rows(module, *rows, scale, options)[None]

    @property
    def is_complete(self) -> bool:
        """Whether every layer has made its call."""
        return self._next_layer == len(self._pools)

    def check_complete(self, model: Any) -> None:
        if not self.is_complete:
            raise changed(model, "fewer")


class Attachment:
    """A model whose forwards can run on the registered attention; between them it is the user's as it was.

    Several sessions may hold one model, in several Python threads.
    """

    def __init__(self, model: Any) -> None:
        self.model = unwrap(model)
        if self.model.training:
            raise InvalidInput("model: got a model in training mode; call model.eval() first")
        if self.model.device.type != "meta":  # where offloaded weights rest
            gpu.backend(self.model.device)  # refused where there are no kernels
        with undisturbed(self.model.device):
            self._known = known(self.model, measure)
        gpu.backend(self.spec.device)
        self.owner, self.switch = self._known.owner, self._known.switch
        weights = (weight() for weight in self._known.weights)
        self._watch = Watch(self.model, [w for w in weights if w is not None])

    @property
    def spec(self) -> ModelSpec:
        """What was measured of the model."""
        return self._known.spec

    @property
    def tested(self) -> bool:
        """Whether this model, as it is, has passed the self-test."""
        return self._known.tested

    @tested.setter
    def tested(self, value: bool) -> None:
        self._known.tested = value

    def check_unchanged(self, remedy: str) -> None:
        """Raise InvalidInput where the model is in training mode, or not the one that was measured."""
        self._watch.check(remedy)
        if self._watch.configured_anew():
            with undisturbed(self.model.device):
                now = known(self.model, measure)
            if now.spec != self.spec:
                raise InvalidInput(
                    "the model's configuration was changed, and with it what its attention sees or how it "
                    f"turns; {remedy}"
                )

    @property
    def is_current(self) -> bool:
        """Whether the model is the one that was measured, with the weights of then."""
        try:
            self._watch.check("")
        except InvalidInput:
            return False
        return self._known.structure == structure(self.model)

    def forward(
        self,
        plan: ops.Plan,
        rows: Sequence[int],
        pools: Sequence[ops.Pool],
        vectors: RowVectors | None = None,
    ) -> Tensor:
        """One packed forward; float32 logits [len(rows), vocab] of the plan's `rows`."""
        device = self.spec.device
        packed = PackedForward(self.spec, pools, plan, self.owner, vectors)
        ids = torch.from_numpy(plan.core.ids).to(device)[None]
        positions = torch.from_numpy(plan.core.positions).to(device)[None]
        keep = torch.tensor(list(rows), dtype=torch.long, device=device)
        extra = {"logits_to_keep": keep} if self.spec.keeps_rows else {}
        logits = self._run(packed, ids, positions, extra)
        if not self.spec.keeps_rows:
            logits = logits[keep]
        logits = logits.float()
        check_finite(logits)
        return logits

    def forward_static(
        self, plan: ops.Plan, pools: Sequence[ops.Pool], ids: Tensor, positions: Tensor
    ) -> Tensor:
        """One forward over tensors at fixed addresses, ids and positions [1, rows]: logits [rows, vocab]."""
        packed = PackedForward(self.spec, pools, plan, self.owner)
        return self._run(packed, ids, positions, {}).float()

    def _run(
        self, packed: PackedForward, ids: Tensor, positions: Tensor, extra: dict[str, Any]
    ) -> Tensor:
        try:
            with Running(packed, self.switch), torch.no_grad():
                out = self.model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        except IndexError as error:
            raise InvalidInput(
                f"step: the model has no embedding for a token or position of this step (positions "
                f"up to {int(positions.max())}): {error}; keep threads shorter"
            ) from error
        packed.check_complete(self.model)
        logits: Tensor = out.logits[0]
        return logits


@dataclass
class Ran:
    """What the forwards of a step brought."""

    logits: dict[int, Tensor] = field(
        default_factory=dict
    )  # [vocab] of each thread that waits for some
    rows: int = 0
    forwards: int = 0
    forward_seconds: float = 0.0


def run_forwards(
    step: _core.Step,
    attachment: Attachment,
    pools: Sequence[ops.Pool],
    invariant: bool,
    vectors: Mapping[int, PathVectors],
) -> Ran:
    """Run a step's forwards one after the other; it is the caller's to commit or to roll back."""
    ran = Ran()
    while step.next():
        plan = ops.Plan(step.plan, invariant=invariant)
        attachment.spec.check_position(int(plan.core.positions.max()))
        for pool in pools if step.plan.num_copies else ():
            ops.copy_tokens(pool, plan)
        wanted = step.logits_rows
        rows = list(dict.fromkeys(row for _, row in wanted)) or [plan.num_rows - 1]
        began = time.perf_counter()
        adds = RowVectors(plan, vectors, attachment.spec) if vectors else None
        logits = attachment.forward(plan, rows, pools, adds or None)
        index = {row: i for i, row in enumerate(rows)}
        for number, row in wanted:
            ran.logits[number] = logits[index[row]]
        ran.rows, ran.forwards = ran.rows + plan.num_rows, ran.forwards + 1
        ran.forward_seconds += time.perf_counter() - began
    return ran
