"""Attaches a model: switches it to the registered attention, runs packed forwards, gives it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from apr import gpu, ops
from apr.errors import InvalidInput, NonFiniteLogits
from apr.interface import IMPLEMENTATION, members, running
from apr.probe import SINKS, LayerSpec, ModelSpec, measure, refuse
from apr.vectors import RowVectors


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


class PackedForward:
    """Stores each layer's new keys and values and attends by the plan."""

    def __init__(
        self,
        spec: ModelSpec,
        pools: Sequence[ops.Pool],
        plan: ops.Plan,
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
            raise refuse(model, "a forward made more attention calls than the probe saw")
        self._next_layer += 1
        return self._spec.layers[self._next_layer - 1], self._pools[self._next_layer - 1]

    def attend_rows(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Any
    ) -> Tensor:
        """q [rows, heads, dim], k and v [rows, kv_heads, dim] -> [rows, heads, dim_v]."""
        layer, pool = self.layer(module)
        if self._vectors is not None:
            k, v = self._vectors.add(self._next_layer - 1, k, v)
        ops.append(k, v, pool, self._plan)
        sinks = next((options[n] for n in SINKS if options.get(n) is not None), None)
        out, _ = ops.attention(
            q,
            pool,
            self._plan,
            scale,
            layer.rotation,
            options.get("softcap"),
            sinks,
            window=layer.window,
            chunk=layer.chunk,
        )
        return out

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor:
        rows = (q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1))
        return self.attend_rows(module, *rows, scale, options)[None]

    def check_complete(self, model: Any) -> None:
        if self._next_layer != len(self._pools):
            raise refuse(model, "a forward made fewer attention calls than the probe saw")


class Attachment:
    """A model switched to the registered attention, until the last holder closes it.

    Several sessions may hold one model; the count and the measurement live on the model itself.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, PreTrainedModel):
            raise InvalidInput(
                f"model: got {type(model).__name__}; expected a transformers PreTrainedModel, e.g. "
                "AutoModelForCausalLM.from_pretrained(...)"
            )
        if model.training:
            raise InvalidInput("model: got a model in training mode; call model.eval() first")
        gpu.backend(
            model.get_input_embeddings().weight.device
        )  # refused where there are no kernels
        self.model = model
        self.owner = members(model)
        self._open = True
        held = getattr(model, "_apr_attachment", None)
        if held is not None:
            held["count"] += 1
            self.spec: ModelSpec = held["spec"]
            self._held = held
            return
        former = model.config._attn_implementation
        try:
            model.set_attn_implementation(IMPLEMENTATION)
            if model.config._attn_implementation != IMPLEMENTATION:
                raise refuse(model, "it does not let its attention implementation be set")
            self.spec = measure(model)
        except BaseException as error:
            model.set_attn_implementation(former)
            if isinstance(error, TypeError):
                raise refuse(model, f"a probe forward failed ({error})") from error
            raise
        self._held = {"count": 1, "spec": self.spec, "former": former, "tested": False}
        model._apr_attachment = self._held

    @property
    def tested(self) -> bool:
        return bool(self._held["tested"])

    @tested.setter
    def tested(self, value: bool) -> None:
        self._held["tested"] = value

    @contextlib.contextmanager
    def stock(self) -> Iterator[None]:
        """Run the model on the implementation that it had before it was attached."""
        self.model.set_attn_implementation(self._held["former"])
        try:
            yield
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)

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
            with running(packed), torch.no_grad():
                out = self.model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        except IndexError as error:
            raise InvalidInput(
                f"step: the model has no embedding for a token or position of this step (positions "
                f"up to {int(positions.max())}): {error}; keep threads shorter"
            ) from error
        packed.check_complete(self.model)
        logits: Tensor = out.logits[0]
        return logits

    def close(self) -> None:
        """Give the model back as it was; safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._held["count"] -= 1
        if self._held["count"] == 0:
            self.model.set_attn_implementation(self._held["former"])
            del self.model._apr_attachment
