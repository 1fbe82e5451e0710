"""What transformers and torch hold of an `apr.Cache`: its layers, and the hooks on its model."""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from apr.errors import InvalidInput
from apr.hf.compatibility import cache_of

if TYPE_CHECKING:
    from apr.cache.cache import Cache


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks of a layer; keys and values lie in the session's pool."""

    is_croppable = True

    def __init__(self, cache: Cache, index: int, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self._cache, self._index = weakref.ref(cache), index

    @property
    def _owner(self) -> Cache:
        cache = self._cache()
        assert cache is not None, "a layer without its cache"
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pool is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._owner.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self._owner.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise InvalidInput("crop: a layer holds no tokens of its own; crop the cache")


class _Hook:
    """A hook on the model that must not keep the cache alive; a copy of the model has one that does
    nothing.

    torch calls a hook without keyword arguments while another Python thread registers or removes
    it.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache = (lambda: None) if cache is None else weakref.ref(cache)

    def __reduce__(self) -> Any:
        return type(self), ()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_dropped(cache: Cache, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedRope where generate() leaves the cache out: longrope changes frequencies."""
    ids, limit = arguments.get("input_ids"), cache.session.spec.position_limit
    if limit is None or ids is None or cache_of(arguments) is not None or cache._step is not None:
        return
    positions = arguments.get("position_ids")
    furthest = ids.shape[1] - 1 if positions is None else int(positions.max())
    if furthest >= limit and (cache._begun or cache._length == limit):
        cache.session.spec.check_position(furthest)


def _is_nested(module: Any) -> bool:
    """Whether this call of a module comes from inside of another one."""
    frame, calls = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        # torch's own frame of a call; the one that runs this hook is one.
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
    return calls > 1


class Before(_Hook):
    def __init__(self, cache: Cache | None = None, model: Any = None) -> None:
        super().__init__(cache)
        parameters = () if model is None else inspect.signature(model.forward).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def __call__(self, module: Any, args: Any, kwargs: Any = None) -> Any:
        cache = self._cache()
        if cache is None or kwargs is None:
            return None
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if cache._step is not None:
            if _is_nested(module):
                raise InvalidInput(
                    "apr.Cache: the model is called inside of its own forward with this cache; "
                    "make that call before or after it, or of a copy of the model"
                )
            cache._finish()  # an interrupt has left it
        if cache_of(arguments) is cache:
            return (), cache._before(module, arguments)
        if cache.session.spec.position_limit is not None:
            check_dropped(cache, arguments)
        return None


class After(_Hook):
    def __call__(self, module: Any, args: Any, *rest: Any) -> Any:
        cache = self._cache()
        # Compiled calls of the user's own, whole graphs perhaps, get no further than this.
        if len(rest) != 2 or cache is None or cache._step is None:
            return None
        return cache._finish(rest[-1])
