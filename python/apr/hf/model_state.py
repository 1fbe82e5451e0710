"""What of a model must stay as it was while threads hold its keys and values, and what is known of
it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from apr.errors import InvalidInput
from apr.hf.interface import Switch, configurations, members
from apr.hf.ranks import RankGroup, group_of
from apr.hf.spec import ModelSpec


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside of what compiles, adapts or replicates it; raises
    InvalidInput.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        adapters = getattr(inner, "peft_config", None) or {}
        if any(getattr(a, "is_prompt_learning", False) for a in adapters.values()):
            raise InvalidInput(
                f"model: got a {type(model).__name__} that learns a prompt: its virtual tokens are "
                "in no thread's text; expected adapters of weights (LoRA and its like)"
            )
        base = getattr(inner, "get_base_model", None)
        inner = (
            base()
            if callable(base)
            else getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        )
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
    modules = list(model.modules())
    tensors = [
        t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    ]
    return (
        tuple(map(id, modules)),
        tuple((id(t), t.dtype, t.device, t.shape) for t in tensors),
        tuple(map(_facts, configurations(model))),
    )


class Watch:
    """Notices what would make stored keys and values, or the measurement, untrue; cheap enough for
    each step.
    """

    def __init__(self, model: PreTrainedModel, weights: list[nn.Parameter]) -> None:
        self._model, self._weights = model, weights
        self._versions = self._sum()
        self._stood = self._table()
        self._configurations = configurations(model)
        self._set = self._settings()

    def _settings(self) -> list[int]:
        """What the configurations are set to, by identity: quick, and other where anything was set
        anew.
        """
        return [sum(map(id, vars(config).values())) for config in self._configurations]

    def configured_anew(self) -> bool:
        """Whether a setting of a configuration was changed since `accept`."""
        return self._set != self._settings()

    def accept(self) -> None:
        """Take the settings as they are: they change nothing that was measured."""
        self._set = self._settings()

    def _sum(self) -> int:
        """Version counters of all parameters: torch counts the changes made in place."""
        return sum(p._version for p in self._weights)

    def _table(self) -> tuple[list[int], torch.dtype, torch.device]:
        """Of the embeddings; hooks that offload make them anew for each forward, so no tensor is
        kept.
        """
        table = self._model.get_input_embeddings().weight
        return list(table.shape), table.dtype, table.device

    def check(self, remedy: str) -> None:
        """Raise InvalidInput where the model is not what it was; `remedy` makes things right
        again.
        """
        if self._model.training:
            raise InvalidInput(
                "the model is in training mode (dropout would make every step differ); call "
                "model.eval()"
            )
        if self._table() != self._stood:
            (was, dtype, device), (now, now_dtype, now_device) = self._stood, self._table()
            raise InvalidInput(
                f"the model was changed: its embeddings were {was}, {dtype} on {device}, and are "
                f"{now}, {now_dtype} on {now_device}; {remedy}"
            )
        if self._sum() != self._versions:
            raise InvalidInput(
                "the model's weights were changed in place, so the stored keys and values belong "
                f"to others; {remedy}"
            )


@dataclass
class Known:
    """What was measured of one model, as long as its structure stays."""

    structure: tuple[Any, ...]
    switch: Switch
    spec: ModelSpec
    owner: frozenset[int]  # ids of its modules and configurations
    # Parameters whose changes in place torch counts; held weakly, as all that leads to the model.
    weights: list[weakref.ref[nn.Parameter]]
    ranks: RankGroup | None  # that share its weights out among them
    tested: bool = False


# A memo, so that a second attach of an unchanged model costs no forward; nothing is written on the
# model.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _absorbs(model: PreTrainedModel, spec: ModelSpec) -> bool:
    """Whether the weights that stand for layers still say all of them: a hook is no part of the
    structure.
    """
    try:
        spec.linears(model)
    except AttributeError:
        return False
    return True


def known(model: PreTrainedModel, measure: Callable[[Any, Switch], ModelSpec]) -> Known:
    """The measurement of a model, made now where there is none of it as it is."""
    with _LOCK:
        found, now = _KNOWN.get(model), structure(model)
        if found is None or found.structure != now or not _absorbs(model, found.spec):
            # The switch counts the forwards that run, so one model has one as long as its parts
            # stay.
            same = found is not None and found.structure[0] == now[0]
            switch = found.switch if found is not None and same else Switch(model)
            spec = measure(model, switch)
            weights = [weakref.ref(p) for p in model.parameters() if not p.is_inference()]
            ranks = found.ranks if found is not None and same else group_of(model)
            owner = members(model)
            found = Known(structure(model), switch, spec, owner, weights, ranks)
            _KNOWN[model] = found
        return found


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Measure a model and not its surroundings: no compiled graphs, no autocast, no default
    device.
    """
    kind = device.type if device.type != "meta" else "cpu"
    with (
        torch.compiler.set_stance("force_eager"),
        torch.autocast(kind, enabled=False),
        torch.device(kind if kind == "cpu" else device),
    ):
        yield
