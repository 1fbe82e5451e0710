"""Layer states of a batch: a cache of the model's own, lent to a forward and kept after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from apr.cache.hooks import Layer
from apr.errors import InvalidInput, UnsupportedModel
from apr.hf.cache_rows import picked, rebuild
from apr.hf.compatibility import CACHE_ARGUMENTS
from apr.hf.layer_states import adopt, empty_cache, lend
from apr.hf.packed import changed

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
        if not states.attends or states.argument not in CACHE_ARGUMENTS:
            raise UnsupportedModel(
                f"apr.Cache: {type(session.attachment.model).__name__} attends by itself, or takes "
                "its cache in a way of its own, and apr.Session keeps it row by row; use "
                "apr.Session and apr.decode, or the model's own cache"
            )
        self._session, self.spec = session, states

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
            return self._check_positions(call, step)
        raise InvalidInput(
            f"apr.Cache: got {what}, which would enter the layer states of this model; expected "
            "padding on the left of the first call alone"
        )

    def _check_positions(self, call: Call, step: Step) -> None:
        at = torch.tensor([[step.threads[owner].position] for owner in step.owners], device="cpu")
        assert call.positions is not None
        if bool(((at + call.real.cumsum(1) - 1 != call.positions) & call.real).any()):
            raise InvalidInput(
                "apr.Cache: got positions that do not go on by one from token to token, where this "
                "model's layer states read one line; give position_ids that count the tokens "
                "without padding"
            )

    def lend(self, cache: Cache, call: Call, step: Step) -> None:
        """Give the model a cache of its own, with what the rows of a step begin with, in the place
        of `cache`; none where the model makes one.
        """
        assert step.core is not None
        starts = [step.core.starts[owner] for owner in step.owners]
        if min(starts) < 0 <= max(starts):
            raise InvalidInput(
                "apr.Cache: some rows begin with this call and others go on; a model with layer "
                "states runs them in calls of their own"
            )
        if self.spec.one_token and call.width > 1 and starts[0] >= 0:
            raise InvalidInput(
                f"apr.Cache: got {call.width} tokens behind stored ones, where this model's own "
                "code takes one at a time (its answers differ); feed them singly, or the whole "
                "text to a cache that is reset"
            )
        held = self._session.table.states
        assert held is not None
        lent = None
        if starts[0] >= 0:
            lent = lend(held.gather(starts), self.spec)
        elif self.spec.starts_empty:
            lent = empty_cache(self._session.attachment.model, self.spec)
        for name in [name for name, given in call.arguments.items() if given is cache]:
            del call.arguments[name]  # a model may overlook other names than its own
        call.arguments[self.spec.argument] = step.lent = lent

    def keep(self, cache: Cache, step: Step, output: Any) -> Any:
        """Hold what a forward left in its cache, a row for each thread; returns its output, with
        `cache` in the place of that.
        """
        held = self._session.table.states
        assert held is not None and step.core is not None
        after, output = _exchange(output, cache)
        if step.lent is not None and after is not step.lent:
            raise changed(self._session.model, "other")
        after = adopt(after, self.spec.attends)
        rows = [step.owners.index(i) for i in range(len(step.threads))]
        after = rebuild(after, torch.Tensor.detach)
        after = picked(after, rows) if len(rows) < len(step.owners) else after
        held.put([end if end >= 0 else None for end in step.core.ends], after)
        return output


def _exchange(output: Any, cache: Cache) -> tuple[Any, Any]:
    """The cache in a forward's output, and that output with `cache` in its place."""
    pairs = output.items() if isinstance(output, dict) else enumerate(output)
    held = [(k, x) for k, x in pairs if isinstance(x, transformers.Cache)]
    if not held:
        raise InvalidInput(
            "apr.Cache: the forward gave no cache back, which holds this model's layer states; "
            "leave use_cache on"
        )
    name, found = held[0]
    if isinstance(output, tuple):
        return found, (*output[:name], cache, *output[name + 1 :])
    output[name] = cache
    return found, output


def layers_of(cache: Cache, session: Session) -> list[Layer]:
    """What transformers asks of each layer of a cache that holds nothing yet."""
    # Of a cache without attention generate() asks nothing, and feeds a whole prompt again.
    windows = [layer.window or layer.chunk for layer in session.spec.layers] or [None]
    return [Layer(cache, i, window is not None) for i, window in enumerate(windows)]
