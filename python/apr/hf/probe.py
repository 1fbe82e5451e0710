"""Measures what a model is by probe forwards: its layers, rotations, windows and chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from apr.errors import UnsupportedModel
from apr.hf import rope
from apr.hf.compatibility import CACHE_ARGUMENTS
from apr.hf.far import NEVER, Reach, measure_reach
from apr.hf.interface import OF_THE_MACHINE, Running, Switch, input_device, members
from apr.hf.latent import Linears
from apr.hf.layer_states import (
    find_cache,
    has_attention,
    has_states,
    measure_states,
)
from apr.hf.spec import SINKS, LayerSpec, ModelSpec
from apr.ops import Rotation

# Tensor arguments of an attention call that change nothing about what is visible.
_HARMLESS = {"position_ids", "cache_position"}


@dataclass
class _Call:
    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    mask_pointer: int | None
    options: dict[str, Any]


class _Carried(Tensor):
    """A mask that tells of its copies on other devices, which hooks bring to the layers there."""

    note: Callable[[Tensor], None]

    @classmethod
    def of(cls, mask: Tensor, note: Callable[[Tensor], None]) -> _Carried:
        note(mask)
        carried = mask.as_subclass(cls)
        carried.note = note
        return carried

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        mask = args[0] if func is Tensor.to else None
        if not isinstance(mask, cls):
            return out
        moved = out.dtype == mask.dtype and out.device != mask.device
        return cls.of(out, mask.note) if moved else out


@dataclass
class _Probe:
    """Records attention and mask calls while stock attention computes."""

    owner: frozenset[int]
    spread: bool
    calls: list[_Call] = field(default_factory=list)
    mask_functions: dict[int, Callable[..., Tensor]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # so that no two masks share an address
    latent: Tensor | None = None

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor:
        pointer = mask.data_ptr() if isinstance(mask, Tensor) else None
        q, k, v = q.detach(), k.detach(), v.detach()
        self.calls.append(_Call(module, q, k, v, pointer, dict(options)))
        plain = {n: x for n, x in options.items() if n not in (*SINKS, "softcap", "is_causal")}
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, scaling=scale, **plain)[0]
        return out

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        if not isinstance(mask, Tensor):
            return mask

        def note(x: Tensor) -> None:
            self.mask_functions[x.data_ptr()] = kwargs["mask_function"]
            self.alive.append(x)

        if self.spread:
            return _Carried.of(mask, note)
        note(mask)
        return mask


def refuse(model: Any, why: str) -> UnsupportedModel:
    """The exception that says why a model cannot be attached."""
    return UnsupportedModel(
        f"{type(model).__name__} cannot be attached: {why}. apr needs a causal language model "
        "whose attention goes through transformers' AttentionInterface, or whose cache has a row "
        "for each sequence"
    )


def _measure_visibility(
    model: Any, function: Callable[..., Tensor]
) -> tuple[int | None, int | None]:
    """(window, chunk) of a mask function: evaluated far out, no configuration is read."""
    device = input_device(model)  # such functions hold tensors of it
    zero, far = torch.zeros((), dtype=torch.long, device=device), 1 << 20
    line = torch.arange(far + 2, device=device)

    def visible(query: int) -> Tensor:
        row = function(zero, zero, torch.tensor(query, device=device), line)
        return torch.as_tensor(row).expand(len(line))

    try:
        keys = visible(far)
    except IndexError as error:
        raise refuse(
            model,
            "its attention mask looks up each call's own tokens (image blocks), so that what it "
            "hides far out cannot be measured",
        ) from error
    first = int(keys.int().argmax())
    if bool(keys[far + 1]) or not bool(keys[first : far + 1].all()):
        raise refuse(model, "its attention mask is not causal with a window or chunk")
    seen_by = int(torch.as_tensor(function(zero, zero, line, zero)).expand(len(line)).sum())
    if seen_by >= far:
        return None, None
    width = int(visible(seen_by).sum())
    if width == seen_by:
        return seen_by, None
    if width == 1 and int(visible(2 * seen_by - 1).sum()) == seen_by:
        return None, seen_by
    raise refuse(model, "its attention mask is neither a window nor a chunk")


def chosen_keys(options: dict[str, Any]) -> Tensor | None:
    """The numbers of the keys that an attention call of a sparse index may see, [..., kept]."""
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in _HARMLESS and value.ndim >= 3:
            return value if value.dtype in (torch.int32, torch.int64) else None
    return None


def _check_options(model: Any, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in _HARMLESS and name not in SINKS:
            raise refuse(model, f"its attention takes a tensor '{name}' that apr does not know")
    if options.get("is_causal") is False:
        raise refuse(model, "its attention is not causal")


def _probe_forward(
    model: Any, switch: Switch, ids: Tensor, positions: Tensor, **more: Any
) -> tuple[_Probe, Any]:
    probe = _Probe(members(model), _is_spread(model))
    try:
        with Running(probe, switch), torch.no_grad():
            out = model(input_ids=ids, position_ids=positions, **{"use_cache": False, **more})
    except (UnsupportedModel, *OF_THE_MACHINE):
        raise
    except Exception as error:
        where = f"at positions up to {int(positions.max())}"
        if model.device.type == "meta":
            where = "with weights on the meta device, where there are no numbers"
        raise refuse(
            model, f"a probe forward failed {where} ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if not probe.calls:
        raise refuse(model, "no layer dispatched to the registered attention function")
    return probe, getattr(out, "logits", None)


def _is_spread(model: Any) -> bool:
    """Whether weights lie on several devices; those that are offloaded, on meta, come and go."""
    return len({p.device for p in model.parameters() if p.device.type != "meta"}) > 1


def _takes_ids(model: Any, layers: Sequence[torch.device]) -> torch.device:
    """Where ids go: to the one device of all layers, wherever weights rest between forwards, or
    to the first of several.
    """
    device: torch.device = model.device
    return layers[0] if len(set(layers)) == 1 or device.type == "meta" else device


def _check_logits(model: Any, logits: Any, ids: Tensor, vocab_size: int) -> None:
    """A model of language gives a score for each token of its vocabulary at each place."""
    if logits is None:
        raise refuse(
            model,
            "its forward returns no logits: load it with AutoModelForCausalLM (a head is missing)",
        )
    shape, want = list(logits.shape), [*ids.shape, vocab_size]
    if shape[:2] != want[:2] or len(shape) != 3 or (shape != want and not model.can_generate()):
        raise refuse(
            model,
            f"its logits are {shape} for ids {list(ids.shape)}, those of a classifier and not of a "
            f"vocabulary of {vocab_size}: load it with AutoModelForCausalLM",
        )


def counts_padding(model: Any) -> bool:
    """Whether the model's own positions, where a call gives none, count padded places too.

    Measured by a stock forward with a hole in its mask: most count places, a few count real tokens.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[5, 6, 7]], device=device) % model.get_input_embeddings().weight.shape[0]
    mask = torch.tensor([[1, 0, 1]], device=device)

    def last(**more: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids, attention_mask=mask, use_cache=False, **more).logits[0, -1]
        return logits.float()

    own = last()
    places, tokens = (
        float((last(position_ids=torch.tensor([x], device=device)) - own).abs().max())
        for x in ([0, 1, 2], [0, 0, 1])
    )
    return places <= tokens


def _measure_reach(
    model: Any, switch: Switch, token: int, limit: int | None, turns: list[bool]
) -> Reach:
    parameters = inspect.signature(model.forward).parameters
    name = next((n for n in CACHE_ARGUMENTS if n in parameters), None)

    def queries(places: list[int], past: Any) -> list[Tensor]:
        rows = torch.tensor(places, device=input_device(model))[:, None]
        more = {} if past is None or name is None else {name: past, "use_cache": True}
        try:
            probe, _ = _probe_forward(model, switch, torch.full_like(rows, token), rows, **more)
        except UnsupportedModel as error:
            raise IndexError from error
        return [call.q[:, :, 0] for call in probe.calls]

    return measure_reach(model, queries, limit, turns)


def measure(model: Any, switch: Switch) -> ModelSpec:
    """What a model is; raises UnsupportedModel."""
    try:
        spec = _measure_attention(model, switch)
    except UnsupportedModel as why:
        return measure_rows(model, switch, why)
    found = _find_cache(model)
    if found is None or not has_states(found[1]):
        return spec
    # Recurrent layers beside attention: a text is one line, and nothing of it is read elsewhere.
    states = measure_states(model, *found, True, partial(refuse, model), "")
    return replace(spec, can_rotate=False, states=states)


def measure_rows(model: Any, switch: Switch, why: UnsupportedModel) -> ModelSpec:
    """The same for a model whose attention cannot run by a plan, for the reason `why`; raises
    UnsupportedModel where its cache cannot be kept by rows either.
    """
    found = _find_cache(model)
    if found is None:
        raise UnsupportedModel(f"{why}. It returns no cache of which rows could be kept")
    parameters = inspect.signature(model.forward).parameters
    line = torch.arange(3, device=input_device(model))[None]
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    with torch.no_grad():
        logits: Any = getattr(model(input_ids=line % vocab_size), "logits", None)
    _check_logits(model, logits, line, vocab_size)
    try:
        # A model without attention has nothing but states, and nothing is slower for it.
        attends = not has_attention(found[1])
        reason = "" if attends else str(why).split(" cannot be attached: ")[-1]
        reason = reason.split(". apr needs")[0]
        states = measure_states(model, *found, attends, partial(refuse, model), reason)
    except OF_THE_MACHINE:
        raise
    except Exception as error:  # from the model's own code, which did not expect such a cache
        raise UnsupportedModel(f"{why}. Rows of its cache cannot be kept: {error}") from error
    states = replace(states, chooses=_chooses(model, switch, line))
    return ModelSpec(
        layers=(),
        can_rotate=False,
        position_limit=None,
        reach=NEVER,
        vocab_size=vocab_size,
        dtype=model.get_input_embeddings().weight.dtype,  # logits may be float32 in any
        device=input_device(model),
        spread=_is_spread(model),
        keeps_rows="logits_to_keep" in parameters,
        takes_positions=False,
        states=states,
    )


def _chooses(model: Any, switch: Switch, line: Tensor) -> bool:
    """Whether its attention is told by number which keys to see."""
    try:
        probe, _ = _probe_forward(model, switch, line, line)
    except UnsupportedModel:
        return False
    return any(chosen_keys(call.options) is not None for call in probe.calls)


def _find_cache(model: Any) -> tuple[str, Any] | None:
    try:
        return find_cache(model)
    except OF_THE_MACHINE:
        raise
    except Exception:  # whatever a model's own code may raise: it has no cache that we can use
        return None


def _layer(
    call: _Call, rotation: Rotation | None, window: int | None, chunk: int | None, linears: Linears
) -> LayerSpec:
    heads, kv_heads, dim, dim_v = call.q.shape[1], call.k.shape[1], call.q.shape[3], call.v.shape[3]
    latent = linears.find(call.module, call.q, call.k, call.v, rotation)
    if latent is not None:
        kv_heads, dim = 1, latent.rank + dim - latent.part
        dim_v = dim
        rotation = latent.turned(rotation)
    return LayerSpec(heads, kv_heads, dim, dim_v, rotation, window, chunk, call.q.device, latent)


def _measure_attention(model: Any, switch: Switch) -> ModelSpec:
    """Find the dispatching layers, their shapes, rotation, windows and chunks; raises
    UnsupportedModel.
    """
    parameters = inspect.signature(model.forward).parameters
    wild = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "position_ids" not in parameters and not wild:
        raise refuse(model, "its forward takes no position_ids")
    table = model.get_input_embeddings().weight
    vocab_size = int(table.shape[0])
    device = input_device(model)
    token = min(5, vocab_size - 1)
    rows = len(rope.PROBE_POSITIONS)
    places = torch.tensor(rope.PROBE_POSITIONS, device=device)[:, None]
    turning, _ = _probe_forward(model, switch, torch.full((rows, 1), token, device=device), places)
    line = torch.arange(3, device=device)[None]
    linears = Linears(model, [call.module for call in turning.calls])
    with linears.watched():
        masking, logits = _probe_forward(model, switch, line.clamp_max(vocab_size - 1), line)
    _check_logits(model, logits, line, vocab_size)
    if len(masking.calls) != len(turning.calls):
        raise refuse(model, "the number of attention calls changes from forward to forward")

    candidates = rope.frequency_candidates(model)
    limit = rope.position_limit(model)
    layers, turns = [], []
    for turned, masked in zip(turning.calls, masking.calls, strict=True):
        _check_options(model, masked.options)
        found = rope.fit(turned.q[:, :, 0], candidates)
        turns.append(found is not rope.Positions.ABSOLUTE)
        window = chunk = None
        if masked.mask_pointer is not None:
            if masked.mask_pointer not in masking.mask_functions:
                raise refuse(model, "it makes its attention mask by itself")
            function = masking.mask_functions[masked.mask_pointer]
            window, chunk = _measure_visibility(model, function)
        rotation = found if isinstance(found, Rotation) else None
        layers.append(_layer(masked, rotation, window, chunk, linears))
    return ModelSpec(
        layers=tuple(layers),
        can_rotate=all(turns),
        position_limit=limit,
        reach=_measure_reach(model, switch, token, limit, turns),
        vocab_size=vocab_size,
        dtype=turning.calls[0].q.dtype,
        device=_takes_ids(model, [layer.device for layer in layers]),
        spread=_is_spread(model),
        keeps_rows="logits_to_keep" in parameters,
    )
