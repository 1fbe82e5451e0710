"""The seam with transformers: one attention and one mask function, and which forward is running."""

from __future__ import annotations

import sys
import threading
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from apr import _core
from apr.errors import Error

IMPLEMENTATION = "apr"

# Failures of the machine, which say nothing about a model.
OF_THE_MACHINE = (
    MemoryError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)


class Forward(Protocol):
    """What handles the attention and mask calls of a running forward.

    owner: ids of the modules and configurations whose calls these are; all others are the user's
    own.
    """

    owner: frozenset[int]
    latent: Tensor | None  # of the layer that runs, where it was told to keep it

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor: ...

    def mask(self, *args: Any, **kwargs: Any) -> Any: ...


# The only globals besides the registration below: which forward of ours runs in this context (a
# Python thread or task), and who switched each configuration that is not as its user put it, by id.
_RUNNING: ContextVar[Running | None] = ContextVar("apr_forward", default=None)
_SWITCHED: dict[int, Switch] = {}


def _innermost() -> Running | None:
    """What is entered in this context; what an interrupt left behind is forgotten."""
    running = _RUNNING.get()
    while running is not None and not running.taken:
        running = running.outer
        _RUNNING.set(running)
    # A context that was copied into another Python thread is none of ours there.
    return running if running is None or running.is_here() else None


def _running() -> Forward | None:
    """The forward of ours that runs in this context."""
    running = _innermost()
    return None if running is None else running.forward


def _former(config: Any) -> str | None:
    """What a configuration stands on while none of our forwards runs."""
    switch = _SWITCHED.get(id(config))
    if switch is not None:
        return switch.former(config)
    name = getattr(config, "_attn_implementation", None)
    return None if name == IMPLEMENTATION else name


def own_attention(module: Any) -> Any:
    """The attention function that a user's own call of a model reaches: another Python thread may
    make one while we have the model switched.
    """
    eager = sdpa_attention_forward
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            eager = found
            break
    name = _former(getattr(module, "config", None))
    return AttentionInterface().get_interface(name or "sdpa", eager)


def own_mask(*args: Any, **kwargs: Any) -> Any:
    """The same for the mask."""
    return AttentionMaskInterface()[_former(kwargs.get("config")) or "sdpa"](*args, **kwargs)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():  # only what is traced in our own forwards stands on this
        sinks = next((kwargs[n] for n in ("s_aux", "sinks") if kwargs.get(n) is not None), None)
        return torch.ops.apr.attend(query, key, value, sinks, scale, kwargs.get("softcap")), None
    running = _running()
    if running is None or id(module) not in running.owner:
        out: tuple[Tensor, Any] = own_attention(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out
    return running.attend(module, query, key, value, attention_mask, scale, kwargs), None


def _mask(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return kwargs.get("attention_mask")
    running, config = _running(), kwargs.get("config")
    if running is None or (config is not None and id(config) not in running.owner):
        return own_mask(*args, **kwargs)
    return running.mask(*args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


@torch.library.custom_op(
    "apr::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, float? softcap) -> Tensor",
)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of the running forward as one operator, so that a compiled model has no graph break
    there.
    """
    running = _running()
    if running is None:
        raise Error(
            "a model that was compiled in a forward of apr ran outside of one; call "
            "torch.compiler.reset() and run it again"
        )
    options = {"softcap": softcap, "s_aux": sinks}
    return running.attend(None, q, k, v, None, scale, options).contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Any, scale: float, softcap: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _keep_latent(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
    """A hook before a linear layer: its input is the latent of the attention that follows."""
    if torch.compiler.is_compiling():
        return (torch.ops.apr.keep_latent(args[0]), *args[1:])
    running = _running()
    if running is not None and id(module) in running.owner:
        running.latent = args[0]
    return None


_keep_latent.is_apr = True  # type: ignore[attr-defined]


def _hooks_of(linear: torch.nn.Module) -> list[int]:
    """Keys of our hook, wherever an interrupt left one."""
    return [key for key, hook in linear._forward_pre_hooks.items() if hook is _keep_latent]


@torch.library.custom_op("apr::keep_latent", mutates_args=())
def _keep(latent: Tensor) -> Tensor:
    """The same in a compiled model, which goes on with the copy: so it is not left out."""
    running = _running()
    if running is not None:
        running.latent = latent
    return latent.clone()


@_keep.register_fake
def _(latent: Tensor) -> Tensor:
    return torch.empty_like(latent)


class Switch:
    """Puts a model on our implementation while forwards of ours run, in however many Python
    threads.

    Between them the model stands where its user put it, so that the user's own calls are stock.
    """

    def __init__(self, model: Any) -> None:
        self._configs = configurations(model)
        self._stood: dict[int, str | None] = {}  # what they stood on, while they are switched
        self._lock = threading.RLock()  # an interrupt as it is let go must not block the next call
        self._holders: list[Running] = []
        self._linears: list[torch.nn.Module] = []

    def keep_latents(self, linears: list[torch.nn.Module]) -> None:
        """Tell forwards of ours what these layers are given."""
        with self._lock:
            self._linears = [*linears, *(x for x in self._linears if _hooks_of(x))]

    def former(self, config: Any) -> str | None:
        """What a configuration stood on; what an interrupt left switched is put back."""
        self.put_back()
        name = self._stood.get(id(config), config._attn_implementation)
        return None if name == IMPLEMENTATION else name

    def on(self, holder: Running) -> None:
        """Switch while `holder` runs; an interrupt may come anywhere, `put_back` puts it right."""
        with self._lock:
            self._holders = [*self._entered(), holder]
            if not self._stood:
                self._stood = {id(c): c._attn_implementation for c in self._configs}
            _SWITCHED.update(dict.fromkeys(self._stood, self))
            for config in self._configs:
                if config._attn_implementation != IMPLEMENTATION:
                    config._attn_implementation = IMPLEMENTATION
            for linear in self._linears:
                if not _hooks_of(linear):
                    # First, before a shard's own hook makes the input a DTensor.
                    linear.register_forward_pre_hook(_keep_latent, prepend=True)

    def _entered(self) -> list[Running]:
        return [holder for holder in self._holders if holder.taken]

    def put_back(self) -> None:
        """Put the model where its user put it, where no forward runs; safe to call at any time."""
        _innermost()
        with self._lock:
            self._holders = self._entered()
            if self._holders or not self._stood:
                return
            for linear in self._linears:
                for key in _hooks_of(linear):
                    del linear._forward_pre_hooks[key]
            # Setting one sets those below it too, so the outer ones come first.
            for config in self._configs:
                if config._attn_implementation != self._stood[id(config)]:
                    config._attn_implementation = self._stood[id(config)]
            for config in self._configs:
                _SWITCHED.pop(id(config), None)
            self._stood = {}

    def is_stuck(self) -> bool:
        """Whether the model stands on ours though no forward runs, and cannot be put back."""
        self.put_back()
        on = any(config._attn_implementation == IMPLEMENTATION for config in self._configs)
        return on and not self._entered()


class Running(_core.Turn):
    """Routes the attention calls of this context to `forward` while it is entered. One that an
    interrupt kept from leaving in full has ended all the same.
    """

    def __init__(self, forward: Forward, switch: Switch) -> None:
        super().__init__()
        self.forward, self._switch = forward, switch
        self.outer: Running | None = None
        self._ident = threading.get_ident()

    def is_here(self) -> bool:
        """Whether it runs in this Python thread."""
        return self._ident == threading.get_ident()

    def entered(self) -> None:
        """Begin, when it counts as running."""
        self.outer = _innermost()
        self._switch.on(self)
        _RUNNING.set(self)

    def left(self) -> None:
        """Put things back, after the end; what an interrupt leaves of it is done when it
        matters.
        """
        self._switch.put_back()


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs; of what is offloaded, weights rest on the meta device, and
    hooks bring inputs to where it runs.
    """
    device: torch.device = model.device
    return device if device.type != "meta" else torch.device("cpu")


def configurations(model: Any) -> list[Any]:
    """The distinct configurations of a model's modules, and those below them, outer ones first."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", ()):
            add(getattr(config, name, None))

    for module in model.modules():
        add(vars(module).get("config"))
    return list(found.values())


def members(model: Any) -> frozenset[int]:
    """Ids of a model's modules and of their configurations."""
    return frozenset(map(id, [*model.modules(), *configurations(model)]))
