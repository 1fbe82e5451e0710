"""Rows of a model's own cache, taken apart and put together, whatever layers it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from apr.ops.device import Copies

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


def picked(cache: Any, rows: Sequence[int]) -> Any:
    """A copy of a cache with these of its rows."""
    at = Copies(rows)
    return rebuild(cache, lambda x: x.index_select(0, at.on(x.device)))


@dataclass(eq=False)
class Batch:
    """A cache as a forward left it, and which states its rows are."""

    cache: Any
    states: list[int | None]
    fixed: bool = False  # its tensors are written over in place

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
        self._where: dict[int, tuple[Batch, int]] = {}

    def __len__(self) -> int:
        return len(self._where)

    @property
    def nbytes(self) -> int:
        """Bytes that are held, those of rows in use by nobody included."""
        batches = {id(batch): batch for batch, _ in self._where.values()}
        return sum(x.nbytes for batch in batches.values() for x in leaves(batch.cache))

    def kind_of(self, state: int) -> tuple[Any, ...]:
        """What all states must have in common that run in one forward."""
        return self._where[state][0].kind

    def batches_of(self, states: Sequence[int]) -> list[Batch]:
        """The batches in which these states lie, each once."""
        return list(
            {id(batch): batch for batch, _ in map(self._where.__getitem__, states)}.values()
        )

    def bytes_of(self, states: Sequence[int]) -> int:
        """Bytes of these states alone."""
        return sum(self._where[state][0].row_bytes for state in states)

    def groups(self, states: Sequence[int]) -> list[list[int]]:
        """Indices of `states` (or -1) that can run in one forward, in groups."""
        kinds: dict[Any, list[int]] = {}
        for i, state in enumerate(states):
            key = None if state < 0 else self.kind_of(state)
            kinds.setdefault(key, []).append(i)
        return list(kinds.values())

    def gather(self, states: Sequence[int]) -> Any:
        """A cache whose rows are these states, all of one kind; its tensors may be those that are
        held, unless they are written in place.
        """
        places = [self._where[state] for state in states]
        batch = places[0][0]
        rows = [row for _, row in places]
        if all(b is batch for b, _ in places):
            if rows == list(range(len(batch.states))) and not batch.fixed:
                return rebuild(batch.cache, lambda x: x)
            return picked(batch.cache, rows)
        sources = {id(b): leaves(b.cache) for b, _ in places}
        columns = zip(*([x[row] for x in sources[id(b)]] for b, row in places), strict=True)
        return replaced(batch.cache, (torch.stack(column) for column in columns))

    def put(self, states: Sequence[int | None], cache: Any) -> None:
        """Hold the rows of a cache as these states; None: nobody wants that row."""
        batch = Batch(cache, list(states))
        self.place(states, batch)
        self._compact(batch)

    def place(self, states: Sequence[int | None], batch: Batch) -> None:
        """Let the first rows of a batch, which hold nothing that is wanted, be these states."""
        batch.states[: len(states)] = states
        self._where.update((s, (batch, row)) for row, s in enumerate(states) if s is not None)

    def lie_in(self, batch: Batch, states: Sequence[int]) -> bool:
        """Whether the first rows of a batch are these states."""
        return all(self._where[state] == (batch, row) for row, state in enumerate(states))

    def vacate(self, batch: Batch, but: Collection[int] = ()) -> None:
        """Copy what lies in a batch elsewhere, but for some states."""
        kept = frozenset(but)
        rows = [
            row
            for row, state in enumerate(batch.states)
            if state is not None
            and state not in kept
            and self._where.get(state) == (batch, row)  # else an interrupt came before `place`
        ]
        if rows:
            self._move(batch, rows)
        batch.states[:] = [state if state in kept else None for state in batch.states]

    def drop_freed(self, core: _core.ThreadTable | _core.Step) -> None:
        """Let the states go that nothing leads to any more."""
        touched: dict[int, Batch] = {}
        for state in core.freed_states():
            found = self._where.pop(state, None)
            if found is not None:
                found[0].states[found[1]] = None
                touched[id(found[0])] = found[0]
        for batch in touched.values():
            self._compact(batch)
        core.forget_freed_states()  # last: what an interrupt leaves is asked for again

    def _compact(self, batch: Batch) -> None:
        """Give memory back where half of a batch, or more, is wanted by nobody."""
        alive = batch.alive
        if alive and 2 * len(alive) <= len(batch.states) and not batch.fixed:
            self._move(batch, alive)

    def _move(self, batch: Batch, rows: list[int]) -> None:
        """Let states lie in a batch of their own."""
        states = [batch.states[row] for row in rows]
        self.place(states, Batch(picked(batch.cache, rows), states))
