"""Decode steps that are captured once for each capacity and replayed while views and lengths
change.

Everything that differs between two steps lies in device memory at fixed addresses. The device works
out what each row sees, where it writes and how the work is cut; the host copies token ids, and the
tables of the views when a view was changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from apr import _core, ops
from apr.errors import InvalidInput
from apr.hf.attachment import Attachment
from apr.hf.cache_rows import CacheRows
from apr.hf.graph_states import GraphStates, NotReplayable
from apr.hf.packed import Ran
from apr.hf.ranks import Ranks
from apr.ops import Rotation
from apr.ops import device as gpu

# Graphs that are kept, the last used ones; and partial results of all kinds of layers of one: steps
# that need more are planned, in passes.
_MOST_GRAPHS = 8
_MOST_PART_BYTES = 1 << 29


class Capacity(NamedTuple):
    """What the views of one graph may come to; the kernels are chosen by it."""

    rows: int
    entries: int
    segments: int
    pages: int


def _room(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


def capacity_of(sizes: Sequence[int]) -> Capacity:
    """The smallest class that holds (rows, entries, segments, pages); few classes, so few
    captures.
    """
    rows, entries, segments, pages = sizes
    width = next((w for w in (4, 16, 64, 256) if w >= rows), _room(rows, 256))
    return Capacity(
        width, _room(entries, 8 * width), _room(segments, 2 * width), _room(pages, 1024)
    )


class ViewPlan(ops.Plan):
    """A plan whose tables the device keeps up to date, for one capacity."""

    def __init__(
        self,
        backend: _core.GpuBackend,
        attachment: Attachment,
        pools: Sequence[ops.Pool],
        views: _core.ViewTables,
        capacity: Capacity,
        invariant: bool,
    ) -> None:
        super().__init__(_core.plan([], pools[0].page_size if pools else 1), invariant=invariant)
        self.num_rows = capacity.rows
        device = attachment.spec.device
        self._device = device
        self.slots = torch.full((capacity.rows,), -1, dtype=torch.long, device=device)
        self.positions = torch.zeros(1, capacity.rows, dtype=torch.long, device=device)
        self._views: dict[gpu.Kind, tuple[_core.GpuViews, gpu.Pass]] = {}
        self._turns: dict[Rotation, tuple[Tensor, Tensor]] = {}
        kinds: dict[gpu.Kind, _core.GpuViews] = {}
        for layer, pool in zip(attachment.spec.layers, pools, strict=True):
            kind = gpu.kind_of(pool, layer.q_heads, layer.window or 0, layer.chunk or 0, invariant)
            if kind not in kinds:
                kinds[kind] = backend.views(views, kind.core, tuple(capacity), device.index or 0)
            turn = layer.rotation
            if turn is not None and turn not in self._turns:
                frequencies = torch.tensor(turn.inv_freq, dtype=torch.float64, device=device)
                shape = (capacity.entries, len(turn.inv_freq), 2)
                table = torch.zeros(shape, dtype=torch.float32, device=device)
                self._turns[turn] = (frequencies, table)
        self.part_bytes = sum(core.part_bytes for core in kinds.values())
        if self.part_bytes <= _MOST_PART_BYTES:
            for kind, core in kinds.items():
                self._views[kind] = (core, gpu.memory_of(core, device))
        passes = {kind: one for kind, (_, one) in self._views.items()}
        self.on_gpu.adopt(device, self.slots, passes)

    def rotation_table(self, rotation: Rotation, device: torch.device) -> Tensor | None:
        """cos and sin [entries, pairs, 2]: row i is of the i-th entry, sorted by segment."""
        return self._turns[rotation][1]

    def upload(self, views: _core.ViewTables) -> None:
        """Copy the tables of the views to the device, lengths included."""
        for core, (_, tables, _) in self._views.values():
            core.update(views)
            gpu.refresh_tables(tables, core)

    def step(self) -> None:
        """The device's part before the layers; lengths grow by one."""
        stream = gpu.stream(self._device)
        for core, (_, tables, _) in self._views.values():
            at = tables.data_ptr()
            core.step(at, self.slots.data_ptr(), self.positions.data_ptr(), stream)
        for frequencies, table in self._turns.values():
            core, (_, tables, _) = next(iter(self._views.values()))
            core.turn(
                tables.data_ptr(),
                frequencies.data_ptr(),
                len(frequencies),
                table.data_ptr(),
                stream,
            )


class StepGraph:
    """The forward of one capacity; on the emulated GPU a replay is a call."""

    def __init__(
        self,
        plan: ViewPlan,
        attachment: Attachment,
        pools: Sequence[ops.Pool],
        memory: Any,
        states: GraphStates | None,
    ) -> None:
        self.plan, self.states = plan, states
        device = attachment.spec.device
        ids = torch.zeros(1, plan.num_rows, dtype=torch.long, device=device)
        self._ids, self._device = ids, device

        def forward() -> Tensor:
            plan.step()
            return attachment.forward_static(plan, pools, ids, plan.positions, states)

        with gpu.on(device):
            self._replay = self._capture(forward, device, memory)

    @staticmethod
    def _capture(
        forward: Callable[[], Tensor], device: torch.device, memory: Any
    ) -> Callable[[], Tensor]:
        if device.type != "cuda":
            first = forward()  # written over as a graph writes over its own
            return lambda: first.copy_(forward())
        # Libraries choose their kernels in a first run; it must not be on the stream that is
        # captured.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other Python threads may use the GPU meanwhile, and allocate.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=memory, stream=side, capture_error_mode=mode):
            logits = forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def run(self, ids: Tensor) -> Tensor:
        """Logits [len(ids), vocab], of memory that the next run of any graph writes over."""
        count = len(ids)
        with gpu.on(self._device):
            self._ids[0, :count].copy_(gpu.pinned(ids, self._device), non_blocking=True)
            return self._replay()[:count]


class StepGraphs:
    """Runs a session's ordinary steps: each thread has one token queued, and nothing else has to
    run.
    """

    def __init__(
        self,
        backend: _core.GpuBackend,
        attachment: Attachment,
        pools: Sequence[ops.Pool],
        invariant: bool,
        ranks: Ranks,
    ) -> None:
        self._backend, self._attachment = backend, attachment
        self._pools, self._invariant, self._ranks = pools, invariant, ranks
        # By the number of rows; kept by the graphs that use them.
        self._states: WeakValueDictionary[int, GraphStates] = WeakValueDictionary()
        self._views = _core.ViewTables()
        self._graphs: dict[Capacity, StepGraph | None] = {}  # None: would take too much memory
        self._current: StepGraph | None = None
        on_gpu = attachment.spec.device.type == "cuda"
        self._memory: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self.captures = self.uploads = 0

    def step(
        self,
        table: _core.ThreadTable,
        numbers: list[int],
        before_commit: Callable[[Ran], None],
        held: CacheRows | None,
    ) -> Ran | None:
        """An ordinary step; None where it is none and has to be planned. held: layer states.

        On any exception nothing has run: what the device did is renewed before the next step.
        """
        began = time.perf_counter()
        spec = self._attachment.spec
        if gpu.backend(spec.device) is not self._backend:
            return None  # the emulated GPU was switched off
        try:
            if not self._views.refresh(table, numbers):
                return None
            furthest = self._views.max_position
            spec.check_step(furthest, len(numbers))
            if spec.reach.turning is not None and furthest >= spec.reach.turning:
                return None  # the plan says whether a segment turns
            graph, starts = self._current, self._views.starts
            if graph is None or self._views.changed:
                graph = self._ready(held)
            if graph is None or (graph.states is not None and not graph.states.fits(starts)):
                self._views.forget(table)
                return None
            ids = torch.from_numpy(self._views.ids)
            with self._ranks.together(lambda: self._views.digest):
                if graph.states is not None:
                    graph.states.load(starts)
                logits = graph.run(ids).clone()
            if graph.states is not None:
                graph.states.put(self._views.name_ends(table))
            rows = {number: (logits, row) for row, number in enumerate(numbers)}
            ran = Ran(rows, num_rows=len(numbers), forwards=1)
            before_commit(ran)
            self._views.commit(table)
        except BaseException:
            self._views.forget(table)
            raise
        ran.forward_seconds = time.perf_counter() - began - ran.choice_seconds
        return ran

    def _ready(self, held: CacheRows | None) -> StepGraph | None:
        capacity = capacity_of(self._views.sizes)
        if capacity not in self._graphs:
            with gpu.lasting():
                self._graphs[capacity] = self._make(capacity, held)
        graph = self._graphs.pop(capacity)
        self._graphs[capacity] = graph  # the last used one stands last
        if len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        if graph is not None:
            graph.plan.upload(self._views)
            self.uploads += 1
        self._current = graph
        return graph

    def _make(self, capacity: Capacity, held: CacheRows | None) -> StepGraph | None:
        plan = ViewPlan(
            self._backend, self._attachment, self._pools, self._views, capacity, self._invariant
        )
        if plan.part_bytes > _MOST_PART_BYTES:
            return None
        states = None
        if held is not None:
            states = self._states.get(capacity.rows)
            states = states or GraphStates(held, capacity.rows, self._views.starts[0])
            self._states[capacity.rows] = states
            states.clear()  # a capture runs the model
        self.captures += 1
        try:
            return StepGraph(plan, self._attachment, self._pools, self._memory, states)
        except NotReplayable:
            return None


def step_graphs(
    wanted: bool | None,
    attachment: Attachment,
    pools: Sequence[ops.Pool],
    invariant: bool,
    ranks: Ranks,
) -> StepGraphs | None:
    """What replays a session's steps, where that is wanted; raises InvalidInput where there is no
    GPU.
    """
    backend = gpu.backend(attachment.spec.device)
    if wanted and attachment.spec.by_rows:
        raise InvalidInput(
            "cuda_graphs: got True for a model that runs by rows of its own cache, which grow with "
            "each step, so that none is replayed; leave it None"
        )
    if wanted and backend is None:
        raise InvalidInput(
            f"cuda_graphs: got True for a model on {attachment.spec.device}; expected one on a "
            "GPU; leave it None"
        )
    if wanted and attachment.spec.spread:
        raise InvalidInput(
            "cuda_graphs: got True for a model whose weights lie on several devices; a graph is "
            "captured on one GPU; leave it None"
        )
    if not wanted or backend is None:
        return None
    return StepGraphs(backend, attachment, pools, invariant, ranks)
