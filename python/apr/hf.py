"""The one file that touches transformers' model side: attach, measure, run a packed forward, detach."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from apr import ops, rope
from apr.errors import InvalidInput, UnsupportedModel
from apr.ops import Rotation

IMPLEMENTATION = "apr"

# Tensor arguments of an attention call that change nothing about what is visible.
_HARMLESS = {"position_ids", "cache_position"}
_SINKS = ("s_aux", "sinks")


class Forward(Protocol):
    """What handles the attention and mask calls of a running forward.

    owner: ids of the modules and configurations whose calls these are; all others go to stock SDPA.
    """

    owner: frozenset[int]

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor: ...

    def mask(self, *args: Any, **kwargs: Any) -> Any: ...


# The only global besides the registration below: which forward of ours is running, if any.
_RUNNING: ContextVar[Forward | None] = ContextVar("apr_forward", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    running = _RUNNING.get()
    if running is None or id(module) not in running.owner:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return running.attend(module, query, key, value, attention_mask, scale, kwargs), None


def _mask(*args: Any, **kwargs: Any) -> Any:
    running, config = _RUNNING.get(), kwargs.get("config")
    if running is None or (config is not None and id(config) not in running.owner):
        return sdpa_mask(*args, **kwargs)
    return running.mask(*args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def start_running(forward: Forward | None) -> None:
    """Route the attention calls of this context to `forward`; None ends it."""
    _RUNNING.set(forward)


@contextlib.contextmanager
def running(forward: Forward) -> Iterator[None]:
    """`start_running` for the length of a block."""
    start_running(forward)
    try:
        yield
    finally:
        start_running(None)


def members(model: Any) -> frozenset[int]:
    """Ids of a model's modules and of their configurations."""
    found = {id(module) for module in model.modules()}
    found |= {id(m.config) for m in model.modules() if hasattr(m, "config")}
    return frozenset(found)


def load(path: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or hub id."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise InvalidInput(f"model {path!r} cannot be loaded: {error}") from error


# ---- what a model is, measured --------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSpec:
    """One attention call of a forward, in call order."""

    kv_heads: int
    head_dim: int
    head_dim_v: int
    rotation: Rotation | None
    window: int | None
    chunk: int | None


@dataclass(frozen=True)
class ModelSpec:
    """What the probe found out about a model."""

    layers: tuple[LayerSpec, ...]
    can_rotate: bool
    why_not_rotate: str
    position_limit: int | None
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    keeps_rows: bool  # the forward takes `logits_to_keep`

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        size = torch.empty((), dtype=self.dtype).element_size()
        return size * sum(x.kv_heads * (x.head_dim + x.head_dim_v) for x in self.layers)


@dataclass
class _Call:
    q: Tensor
    kv_heads: int
    head_dim_v: int
    mask_pointer: int | None
    options: dict[str, Any]


@dataclass
class _Probe:
    """Records attention and mask calls while stock attention computes."""

    owner: frozenset[int]
    calls: list[_Call] = field(default_factory=list)
    mask_functions: dict[int, Callable[..., Tensor]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # so that no two masks share an address

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor:
        pointer = mask.data_ptr() if isinstance(mask, Tensor) else None
        self.calls.append(_Call(q.detach(), k.shape[1], v.shape[3], pointer, dict(options)))
        plain = {n: x for n, x in options.items() if n not in (*_SINKS, "softcap", "is_causal")}
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=scale, **plain)[0]
        return out

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        if isinstance(mask, Tensor):
            self.mask_functions[mask.data_ptr()] = kwargs["mask_function"]
            self.alive.append(mask)
        return mask


def _refuse(model: Any, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} cannot be attached: {why}. apr needs a causal language model whose "
        "attention layers all go through transformers' AttentionInterface and mix tokens nowhere else"
    )


def _measure_visibility(
    model: Any, function: Callable[..., Tensor]
) -> tuple[int | None, int | None]:
    """(window, chunk) of a mask function: evaluated far out, no configuration is read."""
    zero, far = torch.zeros((), dtype=torch.long), 1 << 20
    line = torch.arange(far + 2)

    def visible(query: int) -> Tensor:
        row = function(zero, zero, torch.tensor(query), line)
        return torch.as_tensor(row).expand(len(line))

    keys = visible(far)
    first = int(keys.int().argmax())
    if bool(keys[far + 1]) or not bool(keys[first : far + 1].all()):
        raise _refuse(model, "its attention mask is not causal with a window or chunk")
    seen_by = int(torch.as_tensor(function(zero, zero, line, zero)).expand(len(line)).sum())
    if seen_by >= far:
        return None, None
    width = int(visible(seen_by).sum())
    if width == seen_by:
        return seen_by, None
    if width == 1 and int(visible(2 * seen_by - 1).sum()) == seen_by:
        return None, seen_by
    raise _refuse(model, "its attention mask is neither a window nor a chunk")


def _check_options(model: Any, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in _HARMLESS and name not in _SINKS:
            raise _refuse(model, f"its attention takes a tensor '{name}' that apr does not know")
    if options.get("is_causal") is False:
        raise _refuse(model, "its attention is not causal")


def _probe_forward(model: Any, ids: Tensor, positions: Tensor) -> _Probe:
    probe = _Probe(members(model))
    with running(probe), torch.no_grad():
        model(input_ids=ids, position_ids=positions, use_cache=False)
    if not probe.calls:
        raise _refuse(model, "no layer dispatched to the registered attention function")
    return probe


def measure(model: Any) -> ModelSpec:
    """Find the dispatching layers, their shapes, rotation, windows and chunks; raises UnsupportedModel."""
    parameters = inspect.signature(model.forward).parameters
    wild = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "position_ids" not in parameters and not wild:
        raise _refuse(model, "its forward takes no position_ids")
    device = model.get_input_embeddings().weight.device
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    token = min(5, vocab_size - 1)
    rows = len(rope.PROBE_POSITIONS)
    places = torch.tensor(rope.PROBE_POSITIONS, device=device)[:, None]
    turning = _probe_forward(model, torch.full((rows, 1), token, device=device), places)
    line = torch.arange(3, device=device)[None]
    masking = _probe_forward(model, line.clamp_max(vocab_size - 1), line)
    if len(masking.calls) != len(turning.calls):
        raise _refuse(model, "the number of attention calls changes from forward to forward")

    candidates = rope.frequency_candidates(model)
    why, limit = rope.unstable_reason(model)
    layers = []
    for turned, masked in zip(turning.calls, masking.calls, strict=True):
        _check_options(model, masked.options)
        found = rope.fit(turned.q[:, :, 0], candidates)
        if found is rope.Positions.ABSOLUTE:
            why = why or "positions enter by a learned or absolute embedding, not by rotation"
        window = chunk = None
        if masked.mask_pointer is not None:
            if masked.mask_pointer not in masking.mask_functions:
                raise _refuse(model, "it changes the attention mask after making it")
            function = masking.mask_functions[masked.mask_pointer]
            window, chunk = _measure_visibility(model, function)
        rotation = found if isinstance(found, Rotation) else None
        layers.append(
            LayerSpec(
                masked.kv_heads, masked.q.shape[3], masked.head_dim_v, rotation, window, chunk
            )
        )
    return ModelSpec(
        layers=tuple(layers),
        can_rotate=why is None,
        why_not_rotate=why or "",
        position_limit=limit,
        vocab_size=vocab_size,
        dtype=turning.calls[0].q.dtype,
        device=device,
        keeps_rows="logits_to_keep" in parameters,
    )


# ---- a packed forward -----------------------------------------------------------------------------


class PackedForward:
    """Stores each layer's new keys and values and attends by the plan."""

    def __init__(
        self,
        spec: ModelSpec,
        pools: Sequence[ops.Pool],
        plan: ops.Plan,
        owner: frozenset[int],
    ) -> None:
        self._spec, self._pools, self._plan, self.owner = spec, pools, plan, owner
        self._next_layer = 0

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("attention_mask")  # the 2-D padding or None; nothing dense is built

    def layer(self, model: Any) -> tuple[LayerSpec, ops.Pool]:
        if self._next_layer >= len(self._pools):
            raise _refuse(model, "a forward made more attention calls than the probe saw")
        self._next_layer += 1
        return self._spec.layers[self._next_layer - 1], self._pools[self._next_layer - 1]

    def attend_rows(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Any
    ) -> Tensor:
        """q [rows, heads, dim], k and v [rows, kv_heads, dim] -> [rows, heads, dim_v]."""
        layer, pool = self.layer(module)
        ops.append(k, v, pool, self._plan)
        sinks = next((options[n] for n in _SINKS if options.get(n) is not None), None)
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
            raise _refuse(model, "a forward made fewer attention calls than the probe saw")


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
        ops.check_device("model", model.get_input_embeddings().weight.device)
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
                raise _refuse(model, "it does not let its attention implementation be set")
            self.spec = measure(model)
        except BaseException as error:
            model.set_attn_implementation(former)
            if isinstance(error, TypeError):
                raise _refuse(model, f"a probe forward failed ({error})") from error
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
    ) -> Tensor:
        """One packed forward; float32 logits [len(rows), vocab] of the plan's `rows`."""
        device = self.spec.device
        packed = PackedForward(self.spec, pools, plan, self.owner)
        ids = torch.from_numpy(plan.core.ids).to(device)[None]
        positions = torch.from_numpy(plan.core.positions).to(device)[None]
        keep = torch.tensor(list(rows), dtype=torch.long, device=device)
        extra = {"logits_to_keep": keep} if self.spec.keeps_rows else {}
        with running(packed), torch.no_grad():
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        packed.check_complete(self.model)
        logits: Tensor = out.logits[0]
        if not self.spec.keeps_rows:
            logits = logits[keep]
        return logits.float()

    def close(self) -> None:
        """Give the model back as it was; safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._held["count"] -= 1
        if self._held["count"] == 0:
            self.model.set_attn_implementation(self._held["former"])
            del self.model._apr_attachment
