"""Decode steps that are captured once for each capacity and replayed while views and lengths change.

Everything that differs between two steps lies in device memory at fixed addresses. The device works out
what each row sees, where it writes and how the work is cut; the host copies token ids, and the tables of
the views when a view was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apr import _core, gpu, ops
from apr.errors import InvalidInput
from apr.hf import Attachment, check_finite
from apr.ops import Rotation


class Capacity(NamedTuple):
    """What the views of one graph may come to; the kernels are chosen by it."""

    rows: int
    entries: int
    segments: int
    pages: int


def _room(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


def capacity_of(sizes: Sequence[int]) -> Capacity:
    """The smallest class that holds (rows, entries, segments, pages); few classes, so few captures."""
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
        super().__init__(_core.plan([], pools[0].page_size), invariant=invariant)
        self.num_rows = capacity.rows
        device = pools[0].k.device
        self._device = device
        self.slots = torch.full((capacity.rows,), -1, dtype=torch.long, device=device)
        self.positions = torch.zeros(1, capacity.rows, dtype=torch.long, device=device)
        self._views: dict[gpu.Kind, tuple[_core.GpuViews, gpu.Pass]] = {}
        self._turns: dict[Rotation, tuple[Tensor, Tensor]] = {}
        for layer, pool in zip(attachment.spec.layers, pools, strict=True):
            kind = gpu.kind_of(pool, layer.q_heads, layer.window or 0, layer.chunk or 0, invariant)
            if kind not in self._views:
                core = backend.views(views, kind, tuple(capacity), device.index or 0)
                self._views[kind] = (core, gpu.memory_of(core, device))
            turn = layer.rotation
            if turn is not None and turn not in self._turns:
                frequencies = torch.tensor(turn.inv_freq, dtype=torch.float64, device=device)
                table = torch.zeros(capacity.entries, len(turn.inv_freq), 2, device=device)
                self._turns[turn] = (frequencies, table)
        passes = {kind: one for kind, (_, one) in self._views.items()}
        self.on_gpu.adopt(device, self.slots, passes)

    def rotation_table(self, rotation: Rotation, device: torch.device) -> Tensor | None:
        """cos and sin [entries, pairs, 2]: row i is of the i-th entry, sorted by segment."""
        return self._turns[rotation][1]

    def upload(self, views: _core.ViewTables) -> None:
        """Copy the tables of the views to the device, lengths included."""
        for core, (_, tables, _) in self._views.values():
            core.update(views)
            upload = torch.from_numpy(core.upload)
            tables[: len(upload)].copy_(upload)

    def step(self) -> None:
        """The device's part before the layers; lengths grow by one."""
        stream = gpu.stream(self._device)
        for core, (_, tables, _) in self._views.values():
            at = tables.data_ptr()
            core.step(at, self.slots.data_ptr(), self.positions.data_ptr(), stream)
        core, (_, tables, _) = next(iter(self._views.values()))
        for frequencies, table in self._turns.values():
            core.turn(
                tables.data_ptr(),
                frequencies.data_ptr(),
                len(frequencies),
                table.data_ptr(),
                stream,
            )


class StepGraph:
    """The forward of one capacity; on the emulated GPU a replay is a call."""

    def __init__(self, plan: ViewPlan, attachment: Attachment, pools: Sequence[ops.Pool]) -> None:
        self.plan = plan
        device = pools[0].k.device
        self.ids = torch.zeros(1, plan.num_rows, dtype=torch.long, device=device)

        def forward() -> Tensor:
            plan.step()
            return attachment.forward_static(plan, pools, self.ids, plan.positions)

        self._replay: Callable[[], Tensor] = forward
        if device.type == "cuda":
            with gpu.on(device):
                self._replay = self._capture(forward, device)

    def _capture(self, forward: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        # Libraries choose their kernels in a first run; it must not be on the stream that is captured.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            logits = forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def run(self, ids: Tensor) -> Tensor:
        """float32 logits [len(ids), vocab], of memory that the next run writes over."""
        self.ids[0, : len(ids)].copy_(ids)
        with gpu.on(self.ids.device):
            return self._replay()[: len(ids)]


class StepGraphs:
    """Runs a session's ordinary steps: each thread has one token queued, and nothing else has to run."""

    def __init__(
        self,
        backend: _core.GpuBackend,
        attachment: Attachment,
        pools: Sequence[ops.Pool],
        invariant: bool,
    ) -> None:
        self._backend, self._attachment = backend, attachment
        self._pools, self._invariant = pools, invariant
        self._views = _core.ViewTables()
        self._graphs: dict[Capacity, StepGraph] = {}
        self._current: StepGraph | None = None
        self.captures = self.uploads = 0

    def plan(self, table: _core.ThreadTable, numbers: list[int]) -> int | None:
        """Ready the views for a step: the furthest position it writes at; None for no ordinary step."""
        return self._views.max_position if self._views.refresh(table, numbers) else None

    def run(self) -> Tensor:
        """float32 logits [threads, vocab] of the step that was planned; `commit` or `forget` ends it."""
        graph = self._current
        if graph is None or self._views.changed:
            graph = self._ready()
        logits = graph.run(torch.from_numpy(self._views.ids)).clone()
        check_finite(logits)
        return logits

    def _ready(self) -> StepGraph:
        capacity = capacity_of(self._views.sizes)
        graph = self._graphs.get(capacity)
        if graph is None:
            plan = ViewPlan(
                self._backend,
                self._attachment,
                self._pools,
                self._views,
                capacity,
                self._invariant,
            )
            graph = self._graphs[capacity] = StepGraph(plan, self._attachment, self._pools)
            self.captures += 1
        graph.plan.upload(self._views)
        self.uploads += 1
        self._current = graph
        return graph

    def commit(self) -> None:
        """The step counts: lengths have grown."""
        self._views.commit()

    def forget(self) -> None:
        """The step does not count; the device's lengths are renewed before the next."""
        self._views.forget()


def step_graphs(
    wanted: bool | None, attachment: Attachment, pools: Sequence[ops.Pool], invariant: bool
) -> StepGraphs | None:
    """What replays a session's steps, where that is wanted; raises InvalidInput where there is no GPU."""
    backend = gpu.backend(attachment.spec.device)
    if wanted and backend is None:
        raise InvalidInput(
            f"cuda_graphs: got True for a model on {attachment.spec.device}; expected one on a GPU; "
            "leave it None"
        )
    return StepGraphs(backend, attachment, pools, invariant) if wanted and backend else None
