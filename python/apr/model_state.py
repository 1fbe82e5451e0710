"""What of a model must stay as it was while threads hold its keys and values, and what is known of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from apr.errors import InvalidInput
from apr.interface import Switch, configurations
from apr.probe import ModelSpec


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside of what compiles, adapts or replicates it; raises InvalidInput."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        adapters = getattr(inner, "peft_config", None) or {}
        if any(getattr(a, "is_prompt_learning", False) for a in adapters.values()):
            raise InvalidInput(
                f"model: got a {type(model).__name__} that learns a prompt: its virtual tokens are in no "
                "thread's text; expected adapters of weights (LoRA and its like)"
            )
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, PreTrainedModel):
        raise InvalidInput(
            f"model: got {type(model).__name__}; expected a transformers PreTrainedModel, e.g. "
            "AutoModelForCausalLM.from_pretrained(...), or one inside of torch.compile, PEFT or "
            "DataParallel"
        )
    return inner


def _facts(config: Any) -> tuple[str, ...]:
    below = {id(getattr(config, name, None)) for name in getattr(config, "sub_configs", ())}
    return tuple(
        f"{name}={value!r}"
        for name, value in vars(config).items()
        if id(value) not in below and name != "_attn_implementation_internal"
    )


def structure(model: nn.Module) -> tuple[Any, ...]:
    """Everything of a model that a measurement depends on, but for the values of its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        tuple(map(id, model.modules())),
        tuple((id(t), t.dtype, t.device, t.shape) for t in tensors),
        tuple(map(_facts, configurations(model))),
    )


class Watch:
    """Notices what would make stored keys and values, or the measurement, untrue; cheap enough for each step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._weights = [p for p in model.parameters() if not p.is_inference()]
        self._versions = self._sum()
        self._table = model.get_input_embeddings().weight
        self._stood = (self._table.dtype, self._table.device)

    def _sum(self) -> int:
        """Version counters of all parameters: torch counts the changes made in place."""
        return sum(p._version for p in self._weights)

    def check(self, remedy: str) -> None:
        """Raise InvalidInput where the model is not what it was; `remedy` makes things right again."""
        if self._model.training:
            raise InvalidInput(
                "the model is in training mode (dropout would make every step differ); call model.eval()"
            )
        table = self._model.get_input_embeddings().weight
        if table is not self._table or (table.dtype, table.device) != self._stood:
            raise InvalidInput(
                f"the model was changed: its embeddings were {list(self._table.shape)}, {self._stood[0]} on "
                f"{self._stood[1]}, and are {list(table.shape)}, {table.dtype} on {table.device}; {remedy}"
            )
        if self._sum() != self._versions:
            raise InvalidInput(
                "the model's weights were changed in place, so the stored keys and values belong to "
                f"others; {remedy}"
            )


@dataclass
class Known:
    """What was measured of one model, as long as its structure stays."""

    structure: tuple[Any, ...]
    switch: Switch
    spec: ModelSpec
    tested: bool = False


# A memo, so that a second attach of an unchanged model costs no forward; nothing is written on the model.
_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()
_LOCK = threading.Lock()


def known(model: PreTrainedModel, measure: Callable[[Any, Switch], ModelSpec]) -> Known:
    """The measurement of a model, made now where there is none of it as it is."""
    with _LOCK:
        found, now = _KNOWN.get(model), structure(model)
        if found is None or found.structure != now:
            # The switch counts the forwards that run, so one model has one as long as its parts stay.
            same = found is not None and found.structure[0] == now[0]
            switch = found.switch if found is not None and same else Switch(model)
            spec = measure(model, switch)
            found = _KNOWN[model] = Known(structure(model), switch, spec)
        return found


def run_eagerly() -> Any:
    """Within it compiled models run as they are written: what is measured is the model, not its graphs."""
    return torch.compiler.set_stance("force_eager")
