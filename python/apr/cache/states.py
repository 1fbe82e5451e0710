"""Layer states of a batch: layers of a model's own cache, filled before a forward, then kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from apr.cache.hooks import Layer
from apr.errors import InvalidInput, UnsupportedModel
from apr.hf.cache_rows import leaves, rebuild
from apr.hf.compatibility import CACHE_ARGUMENTS
from apr.hf.layer_states import empty_cache, lend

if TYPE_CHECKING:
    from apr.cache.cache import Cache
    from apr.cache.call import Call
    from apr.cache.forward import Step
    from apr.threads.session import Session


class BatchStates:
    """What the recurrent layers of a model hold for the rows of a cache."""

    def __init__(self, session: Session) -> None:
        states = session.spec.states
        assert states is not None
        # generate() shows by the positions that it gives whether a prompt is whole.
        ordinary = states.argument in CACHE_ARGUMENTS and session.spec.takes_positions
        if not (states.attends and states.starts_empty and ordinary):
            raise UnsupportedModel(
                f"apr.Cache: {type(session.attachment.model).__name__} runs with its own kind of "
                "cache only, which apr.Session keeps row by row; use apr.Session and apr.decode, "
                "or the model's own cache"
            )
        self._session, self.spec = session, states

    def _empty(self) -> Any:
        return empty_cache(self._session.attachment.model, self.spec)

    def layers(self, cache: Cache) -> list[Any]:
        """Layers for a cache that holds nothing yet."""
        return [
            layer
            if self._holds_states(layer) or not isinstance(layer, CacheLayerMixin)
            else Layer(cache, i, bool(getattr(layer, "is_sliding", False)))
            for i, layer in enumerate(self._empty().layers)
        ]

    @staticmethod
    def _holds_states(layer: Any) -> bool:
        return isinstance(layer, LinearAttentionCacheLayerMixin)

    def check(self, call: Call, step: Step) -> None:
        """Raise InvalidInput for padding that would enter a row's state: what a row reads is one
        line, and padding may stand on its left in the first call.
        """
        behind = call.real.cummax(1).values & ~call.real
        if not bool(call.real.any(1).all()):
            what = "a row that is padding alone"
        elif bool(behind.any()):
            what = "padding behind real tokens"
        elif any(map(len, step.threads)) and not bool(call.real.all()):
            what = "padding behind stored tokens"
        else:
            return
        raise InvalidInput(
            f"apr.Cache: got {what}, which would enter the layer states of this model; expected "
            "padding on the left of the first call alone"
        )

    def load(self, cache: Cache, step: Step, width: int) -> None:
        """Give the layers of `cache` what the rows of a step of `width` columns begin with."""
        assert step.core is not None
        starts = [step.core.starts[owner] for owner in step.owners]
        if min(starts) < 0 <= max(starts):
            raise InvalidInput(
                "apr.Cache: some rows begin with this call and others go on; a model with layer "
                "states runs them in calls of their own"
            )
        if self.spec.one_token and width > 1 and starts[0] >= 0:
            raise InvalidInput(
                f"apr.Cache: got {width} tokens behind stored ones, where this model's own code "
                "takes one at a time (its answers differ); feed them singly, or the whole text "
                "to a cache that is reset"
            )
        held = self._session.table.states
        assert held is not None
        given = self._empty() if starts[0] < 0 else lend(held.gather(starts), self.spec)
        for i, layer in enumerate(given.layers):
            if self._holds_states(layer):
                cache.layers[i] = layer

    def keep(self, cache: Cache, step: Step) -> None:
        """Hold what a forward left in the layers of `cache`, a row for each thread."""
        held = self._session.table.states
        assert held is not None and step.core is not None
        after = self._empty()
        for i, layer in enumerate(cache.layers):
            if self._holds_states(layer):
                after.layers[i] = layer
        rows = [step.owners.index(i) for i in range(len(step.threads))]
        if len(rows) < len(step.owners):
            at = torch.tensor(rows, device=leaves(after)[0].device)
            after = rebuild(after, lambda x: x.detach().index_select(0, at.to(x.device)))
        else:
            after = rebuild(after, torch.Tensor.detach)
        held.put([end if end >= 0 else None for end in step.core.ends], after)


def layers_of(cache: Cache, session: Session, states: BatchStates | None) -> list[Any]:
    """What transformers asks of each layer of a cache that holds nothing yet."""
    if states is not None:
        return states.layers(cache)
    windows = [layer.window or layer.chunk for layer in session.spec.layers]
    return [Layer(cache, i, window is not None) for i, window in enumerate(windows)]
