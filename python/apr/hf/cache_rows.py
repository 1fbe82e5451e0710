"""Rows of a model's own cache, taken apart and put together, whatever layers it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from apr import _core


def _parts(node: Any) -> Iterable[tuple[Any, Any]]:
    """(key, value) of what a part of a cache is made of; nothing for a plain value."""
    if isinstance(node, dict):
        return node.items()
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    own = type(node).__module__.startswith(("transformers", "apr."))
    if own and not isinstance(node, (PreTrainedConfig, nn.Module)):
        return vars(node).items() if hasattr(node, "__dict__") else ()
    return ()


def _walk(node: Any) -> Iterator[Any]:
    """Tensors and plain values below a node, in one order."""
    if isinstance(node, Tensor):
        yield node if node.ndim else node.item()  # a setting that is kept as a tensor
        return
    parts = list(_parts(node))
    for key, value in parts:
        yield key
        yield from _walk(value)
    if not parts and isinstance(node, (bool, int, float, str, type(None))):
        yield node


def leaves(node: Any) -> list[Tensor]:
    """The tensors of a cache, in one order; all of them have a row for each sequence."""
    if isinstance(node, Tensor):
        return [node] if node.ndim else []
    return [x for _, value in _parts(node) for x in leaves(value)]


def kind(cache: Any) -> tuple[Any, ...]:
    """What two caches must have in common for their rows to run in one forward."""
    return tuple(
        (tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else x for x in _walk(cache)
    )


def rebuild(node: Any, leaf: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a cache with other tensors; nothing that a forward may change is shared."""
    if isinstance(node, Tensor):
        return leaf(node) if node.ndim else node.clone()
    parts = list(_parts(node))
    if not parts and not isinstance(node, (dict, list)):
        return node
    made = [(key, rebuild(value, leaf)) for key, value in parts]
    if isinstance(node, (list, tuple)):
        return type(node)(value for _, value in made)
    if isinstance(node, dict):
        new = copy.copy(node)
        new.update(made)
        return new
    new = copy.copy(node)
    vars(new).update(made)
    return new


def replaced(cache: Any, tensors: Iterable[Tensor]) -> Any:
    """A copy of a cache with these tensors in place of its own."""
    given = iter(tensors)
    return rebuild(cache, lambda _: next(given))


@dataclass(eq=False)
class _Batch:
    """A cache as a forward left it, and which states its rows are."""

    cache: Any
    states: list[int | None]

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        return kind(self.cache)

    @cached_property
    def row_bytes(self) -> int:
        return sum(x[0].nbytes for x in leaves(self.cache))

    @property
    def alive(self) -> list[int]:
        return [row for row, state in enumerate(self.states) if state is not None]


class CacheRows:
    """The layer states of a session: rows of the caches that its forwards left.

    A state is a number of the core's. Children of a fork share their parent's row until they run; a
    batch whose threads step together again is used as it lies, and nothing is gathered.
    """

    def __init__(self) -> None:
        self._where: dict[int, tuple[_Batch, int]] = {}

    def __len__(self) -> int:
        return len(self._where)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, those of rows in use by nobody included."""
        batches = {id(batch): batch for batch, _ in self._where.values()}
        return sum(x.nbytes for batch in batches.values() for x in leaves(batch.cache))

    def bytes_of(self, states: Sequence[int]) -> int:
        """Bytes of these states alone."""
        return sum(self._where[state][0].row_bytes for state in states)

    def groups(self, states: Sequence[int]) -> list[list[int]]:
        """Indices of `states` (or -1) that can run in one forward, in groups."""
        kinds: dict[Any, list[int]] = {}
        for i, state in enumerate(states):
            key = None if state < 0 else self._where[state][0].kind
            kinds.setdefault(key, []).append(i)
        return list(kinds.values())

    def gather(self, states: Sequence[int]) -> Any:
        """A cache whose rows are these states, all of one kind; its tensors may be those that are
        held.
        """
        places = [self._where[state] for state in states]
        batch = places[0][0]
        rows = [row for _, row in places]
        if all(b is batch for b, _ in places):
            if rows == list(range(len(batch.states))):
                return rebuild(batch.cache, lambda x: x)
            at = torch.tensor(rows, device=leaves(batch.cache)[0].device)
            return rebuild(batch.cache, lambda x: x.index_select(0, at.to(x.device)))
        sources = {id(b): leaves(b.cache) for b, _ in places}
        columns = zip(*([x[row] for x in sources[id(b)]] for b, row in places), strict=True)
        return replaced(batch.cache, (torch.stack(column) for column in columns))

    def put(self, states: Sequence[int | None], cache: Any) -> None:
        """Hold the rows of a cache as these states; None: nobody wants that row."""
        batch = _Batch(cache, list(states))
        self._where.update((s, (batch, row)) for row, s in enumerate(states) if s is not None)
        self._compact(batch)

    def drop_freed(self, core: _core.ThreadTable | _core.Step) -> None:
        """Let the states go that nothing leads to any more."""
        touched: dict[int, _Batch] = {}
        for state in core.freed_states():
            found = self._where.pop(state, None)
            if found is not None:
                found[0].states[found[1]] = None
                touched[id(found[0])] = found[0]
        for batch in touched.values():
            self._compact(batch)
        core.forget_freed_states()  # last: what an interrupt leaves is asked for again

    def _compact(self, batch: _Batch) -> None:
        """Give memory back where half of a batch, or more, is wanted by nobody."""
        alive = batch.alive
        if not alive or 2 * len(alive) > len(batch.states):
            return
        states = [batch.states[row] for row in alive]
        at = torch.tensor(alive, device=leaves(batch.cache)[0].device)
        cache = rebuild(batch.cache, lambda x: x.index_select(0, at.to(x.device)))
        smaller = _Batch(cache, states)
        self._where.update((s, (smaller, i)) for i, s in enumerate(states) if s is not None)
