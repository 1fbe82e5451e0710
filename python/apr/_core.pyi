"""
The native core of apr: threads and views, and the kernels.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "AWAY_PAGE",
    "AttentionCall",
    "AttentionKind",
    "Codes",
    "DType",
    "GpuBackend",
    "GpuCounts",
    "GpuKernel",
    "GpuPlan",
    "GpuShared",
    "GpuTraffic",
    "GpuViews",
    "JoinPositions",
    "Plan",
    "Pool",
    "RotationTable",
    "RowSet",
    "Rows",
    "SampleCall",
    "SeenPages",
    "SegmentHandle",
    "Step",
    "ThreadHandle",
    "ThreadTable",
    "Turn",
    "ViewTables",
    "append",
    "attention",
    "code_group",
    "copy_tokens",
    "count_emulated",
    "emulated_counts",
    "force_instruction_set",
    "force_own_workers",
    "gpu",
    "has_openmp",
    "instruction_set",
    "instruction_sets",
    "map_file",
    "merge",
    "most_vocab",
    "plan",
    "populate",
    "random_bits",
    "row_draw_bytes",
    "run_broken_kernel",
    "sample",
    "set_emulated_device",
    "use_huge_pages",
]

class DType:
    """
    Element types that pools and kernels take.

    Members:

      float32

      bfloat16

      float16
    """

    __members__: typing.ClassVar[dict[str, DType]]
    bfloat16: typing.ClassVar[DType]
    float16: typing.ClassVar[DType]
    float32: typing.ClassVar[DType]
    @typing.overload
    def __eq__(self, other: DType) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: DType) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Codes:
    """
    How pools keep numbers: as they are, or in 8 bits.

    Members:

      none

      int8

      float8
    """

    __members__: typing.ClassVar[dict[str, Codes]]
    float8: typing.ClassVar[Codes]
    int8: typing.ClassVar[Codes]
    none: typing.ClassVar[Codes]
    @typing.overload
    def __eq__(self, other: Codes) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Codes) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Rows:
    """
    [rows, heads, dim], the last dimension contiguous.
    """
    def __init__(
        self,
        data: typing.SupportsInt | typing.SupportsIndex,
        row_stride: typing.SupportsInt | typing.SupportsIndex,
        head_stride: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

class Pool:
    """
    Keys and values of one layer.
    """
    def __init__(
        self,
        *,
        k: typing.SupportsInt | typing.SupportsIndex,
        v: typing.SupportsInt | typing.SupportsIndex,
        k_scales: typing.SupportsInt | typing.SupportsIndex,
        v_scales: typing.SupportsInt | typing.SupportsIndex,
        num_pages: typing.SupportsInt | typing.SupportsIndex,
        kv_heads: typing.SupportsInt | typing.SupportsIndex,
        page_size: typing.SupportsInt | typing.SupportsIndex,
        head_dim_k: typing.SupportsInt | typing.SupportsIndex,
        head_dim_v: typing.SupportsInt | typing.SupportsIndex,
        dtype: DType,
        codes: Codes,
    ) -> None: ...

class RotationTable:
    """
    cos and sin [rotations, pairs, 2].
    """
    def __init__(
        self,
        *,
        cos_sin: typing.SupportsInt | typing.SupportsIndex,
        rotations: typing.SupportsInt | typing.SupportsIndex,
        first: typing.SupportsInt | typing.SupportsIndex,
        pairs: typing.SupportsInt | typing.SupportsIndex,
        interleaved: bool,
    ) -> None: ...

class AttentionCall:
    """
    Attention of one layer; 0: none.
    """
    def __init__(
        self,
        *,
        q: Rows,
        out: Rows,
        lse: typing.SupportsInt | typing.SupportsIndex,
        q_heads: typing.SupportsInt | typing.SupportsIndex,
        scale: typing.SupportsFloat | typing.SupportsIndex,
        softcap: typing.SupportsFloat | typing.SupportsIndex,
        window: typing.SupportsInt | typing.SupportsIndex,
        chunk: typing.SupportsInt | typing.SupportsIndex,
        sinks: typing.SupportsInt | typing.SupportsIndex,
        rotation: RotationTable | None,
        invariant: bool,
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

class AttentionKind:
    """
    What a layer's attention on a GPU is, apart from its tensors.
    """
    def __init__(
        self,
        *,
        dtype: DType,
        codes: Codes,
        q_heads: typing.SupportsInt | typing.SupportsIndex,
        kv_heads: typing.SupportsInt | typing.SupportsIndex,
        head_dim_k: typing.SupportsInt | typing.SupportsIndex,
        head_dim_v: typing.SupportsInt | typing.SupportsIndex,
        page_size: typing.SupportsInt | typing.SupportsIndex,
        window: typing.SupportsInt | typing.SupportsIndex,
        chunk: typing.SupportsInt | typing.SupportsIndex,
        invariant: bool,
    ) -> None: ...

class SampleCall:
    """
    Rows of scores, and where their tokens go.
    """
    def __init__(
        self,
        *,
        scores: typing.SupportsInt | typing.SupportsIndex,
        row_stride: typing.SupportsInt | typing.SupportsIndex,
        dtype: DType,
        logits: typing.SupportsInt | typing.SupportsIndex,
        logits_stride: typing.SupportsInt | typing.SupportsIndex,
        logits_dtype: DType,
        rows: typing.SupportsInt | typing.SupportsIndex,
        vocab: typing.SupportsInt | typing.SupportsIndex,
        draws: typing.SupportsInt | typing.SupportsIndex,
        tokens: typing.SupportsInt | typing.SupportsIndex,
        logprobs: typing.SupportsInt | typing.SupportsIndex,
        drawn_logprobs: typing.SupportsInt | typing.SupportsIndex,
        entropies: typing.SupportsInt | typing.SupportsIndex,
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

class Plan:
    """
    Flat work arrays of one packed forward.
    """
    @property
    def copies(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def digest(self) -> int: ...
    @property
    def furthest_view(self) -> int: ...
    @property
    def ids(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def num_pairs(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def pages_needed(self) -> int: ...
    @property
    def positions(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def rotations(self) -> numpy.typing.NDArray[numpy.int32]: ...
    @property
    def slots(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def writers(self) -> numpy.typing.NDArray[numpy.int64]: ...

class JoinPositions:
    """
    Where joined parts stand.

    Members:

      max

      sum

      keep
    """

    __members__: typing.ClassVar[dict[str, JoinPositions]]
    keep: typing.ClassVar[JoinPositions]
    max: typing.ClassVar[JoinPositions]
    sum: typing.ClassVar[JoinPositions]
    @typing.overload
    def __eq__(self, other: JoinPositions) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: JoinPositions) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Turn:
    """
    Whose turn it is, or whether something runs: it begins before its entry calls `entered`, if there is one, and ends before its exit calls `left`, if there is one.
    """
    def __enter__(self) -> typing.Any: ...
    def __exit__(self, arg0: typing.Any, arg1: typing.Any, arg2: typing.Any) -> None: ...
    def __init__(self) -> None: ...
    def leave(self, who: typing.Any) -> None: ...
    def take(self, who: typing.Any) -> None: ...
    @property
    def taken(self) -> bool: ...

class ThreadHandle:
    """
    Gives back what it stands for when it is let go.
    """
    def __index__(self) -> int: ...
    def __int__(self) -> int: ...
    @property
    def number(self) -> int: ...

class SegmentHandle:
    """
    Gives back what it stands for when it is let go.
    """
    def __index__(self) -> int: ...
    def __int__(self) -> int: ...
    @property
    def number(self) -> int: ...

class ThreadTable:
    """
    Threads, views and segments over a pool of pages.
    """
    def __init__(
        self,
        num_pages: typing.SupportsInt | typing.SupportsIndex,
        page_size: typing.SupportsInt | typing.SupportsIndex,
        can_rotate: bool,
        most_pages: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def alive(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def away_pages(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def bring_back(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def check(self, handles: typing.SupportsInt | typing.SupportsIndex) -> list[str]: ...
    def clear(self) -> list[int]: ...
    def create(
        self, arg0: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> ThreadHandle: ...
    def create_region(
        self,
        tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        base: typing.SupportsInt | typing.SupportsIndex,
        stride: typing.SupportsInt | typing.SupportsIndex,
    ) -> SegmentHandle: ...
    def create_segment(
        self,
        tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        base: typing.SupportsInt | typing.SupportsIndex,
        after: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex | None,
                typing.SupportsInt | typing.SupportsIndex | None,
                typing.SupportsInt | typing.SupportsIndex,
                bool,
            ]
        ],
    ) -> SegmentHandle: ...
    def create_with_view(
        self,
        view: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex | None,
                typing.SupportsInt | typing.SupportsIndex | None,
                typing.SupportsInt | typing.SupportsIndex,
                bool,
            ]
        ],
        writes: typing.SupportsInt | typing.SupportsIndex | None,
        current: bool,
        tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = [],
    ) -> ThreadHandle: ...
    def draws(
        self, arg0: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> list[int]: ...
    def drop(
        self,
        thread: typing.SupportsInt | typing.SupportsIndex,
        start: typing.SupportsInt | typing.SupportsIndex,
        stop: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def edits(
        self, arg0: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> list[int]: ...
    def extend(
        self,
        arg0: typing.SupportsInt | typing.SupportsIndex,
        arg1: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ) -> None: ...
    def extend_each(
        self,
        threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        drawn: collections.abc.Sequence[bool],
        notes: collections.abc.Sequence[list[int]] = [],
    ) -> None: ...
    def follows_others(
        self, threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> bool: ...
    def forget_freed_states(self) -> None: ...
    def fork(
        self,
        arg0: typing.SupportsInt | typing.SupportsIndex,
        arg1: typing.SupportsInt | typing.SupportsIndex,
    ) -> list[ThreadHandle]: ...
    def forks(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def freed_states(self) -> list[int]: ...
    def grow(self, pages: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def hold_segment(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> SegmentHandle: ...
    def hold_thread(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> ThreadHandle: ...
    def idle_segments(self) -> list[int]: ...
    def is_current(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def is_line(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def join(
        self,
        parent: typing.SupportsInt | typing.SupportsIndex,
        children: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        positions: JoinPositions,
        reencode: bool,
    ) -> None: ...
    def keep_states(
        self, checkpoint_tokens: typing.SupportsInt | typing.SupportsIndex, one_token: bool
    ) -> None: ...
    def length(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def load(
        self, numbers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> list[int]: ...
    def make_place(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> list[int]: ...
    def make_room(self, pages: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def nearest_state(
        self,
        thread: typing.SupportsInt | typing.SupportsIndex,
        length: typing.SupportsInt | typing.SupportsIndex,
    ) -> int: ...
    def needs_of(
        self,
        threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        handles: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        all_of_it: bool,
    ) -> tuple[int, list[int]]: ...
    def own_length(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def own_tokens(
        self,
        thread: typing.SupportsInt | typing.SupportsIndex,
        begin: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> list[int]: ...
    def position(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def queued(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def release(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def release_dropped(self) -> list[int]: ...
    def save(
        self,
        threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        segments: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        keys: bool = True,
    ) -> tuple[numpy.typing.NDArray[numpy.int64], list[int], list[int]]: ...
    def seal(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def segment_base(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def segment_encoded(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def segment_length(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def segment_pages(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> list[int]: ...
    def segment_sealed(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def segment_stride(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def segment_tokens(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> list[int]: ...
    def send_away(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def set_view(
        self,
        arg0: typing.SupportsInt | typing.SupportsIndex,
        arg1: collections.abc.Sequence[
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex | None,
                typing.SupportsInt | typing.SupportsIndex | None,
                typing.SupportsInt | typing.SupportsIndex,
                bool,
            ]
        ],
    ) -> None: ...
    def set_writes(
        self,
        arg0: typing.SupportsInt | typing.SupportsIndex,
        arg1: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def sharing(self) -> tuple[int, int, int, int]: ...
    def states_of(
        self, threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> list[int]: ...
    def stored_slots(
        self, thread: typing.SupportsInt | typing.SupportsIndex
    ) -> numpy.typing.NDArray[numpy.int64]: ...
    def tail(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def tokens(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> list[int]: ...
    def trim(
        self,
        arg0: typing.SupportsInt | typing.SupportsIndex,
        arg1: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def trims(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def view(
        self, arg0: typing.SupportsInt | typing.SupportsIndex
    ) -> list[tuple[int, int | None, int | None, int, bool]]: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def num_states(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def offloaded_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def peak_pages(self) -> int: ...
    @property
    def used_pages(self) -> int: ...

class Step:
    """
    One step as a transaction.
    """
    def __init__(
        self,
        table: ThreadTable,
        threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        has_logits: collections.abc.Sequence[bool],
        step_tokens: typing.SupportsInt | typing.SupportsIndex,
        ragged: bool = False,
    ) -> None: ...
    def commit(self) -> None: ...
    def forget_freed_states(self) -> None: ...
    def freed_states(self) -> list[int]: ...
    def next(self) -> bool: ...
    def rollback(self) -> None: ...
    @property
    def copied_tokens(self) -> int: ...
    @property
    def ends(self) -> list[int]: ...
    @property
    def logits_rows(self) -> list[tuple[int, int]]: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def starts(self) -> list[int]: ...

class GpuPlan:
    """
    One pass over the rows of a plan, for device memory.
    """
    def attention(
        self,
        tables: typing.SupportsInt | typing.SupportsIndex,
        parts: typing.SupportsInt | typing.SupportsIndex,
        pool: Pool,
        call: AttentionCall,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def prepare(
        self,
        tables: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    @property
    def kernel(self) -> str: ...
    @property
    def part_bytes(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...
    @property
    def upload(self) -> numpy.typing.NDArray[numpy.uint8]: ...

class ViewTables:
    """
    Views of threads with one queued token each.
    """
    def __init__(self) -> None: ...
    def commit(self, table: ThreadTable) -> None: ...
    def forget(self, table: ThreadTable) -> None: ...
    def name_ends(self, table: ThreadTable) -> list[int]: ...
    def refresh(
        self,
        table: ThreadTable,
        threads: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ) -> bool: ...
    @property
    def changed(self) -> bool: ...
    @property
    def digest(self) -> int: ...
    @property
    def ids(self) -> numpy.typing.NDArray[numpy.int64]: ...
    @property
    def max_position(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int]: ...
    @property
    def starts(self) -> list[int]: ...

class GpuViews(GpuPlan):
    """
    Views whose lengths grow on the device, for a captured graph.
    """
    def step(
        self,
        tables: typing.SupportsInt | typing.SupportsIndex,
        slots: typing.SupportsInt | typing.SupportsIndex,
        positions: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def turn(
        self,
        tables: typing.SupportsInt | typing.SupportsIndex,
        inv_freq: typing.SupportsInt | typing.SupportsIndex,
        pairs: typing.SupportsInt | typing.SupportsIndex,
        cos_sin: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def update(self, views: ViewTables) -> None: ...

class GpuKernel:
    """
    One compiled attention kernel.
    """
    @property
    def coded(self) -> bool: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def item_rows(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def wide(self) -> bool: ...

class GpuBackend:
    """
    The kernels of a GPU, or of the emulated one.
    """
    def append(
        self,
        k: Rows,
        v: Rows,
        pool: Pool,
        slots: typing.SupportsInt | typing.SupportsIndex,
        rows: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def capability(self, device: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def check(
        self, kind: AttentionKind, device: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def copy_tokens(
        self,
        pool: Pool,
        copies: typing.SupportsInt | typing.SupportsIndex,
        count: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def plan(
        self, plan: Plan, kind: AttentionKind, device: typing.SupportsInt | typing.SupportsIndex
    ) -> list[GpuPlan]: ...
    def sample(
        self, call: SampleCall, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def views(
        self,
        views: ViewTables,
        kind: AttentionKind,
        capacity: typing.Annotated[
            collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(4)"
        ],
        device: typing.SupportsInt | typing.SupportsIndex,
    ) -> GpuViews: ...
    @property
    def architectures(self) -> str: ...
    @property
    def kernels(self) -> list[GpuKernel]: ...

class GpuTraffic:
    """
    What warps asked of device memory for some data.
    """
    @property
    def bytes(self) -> int: ...
    @property
    def least_sectors(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def sectors(self) -> int: ...

class GpuShared:
    """
    What warps asked of shared memory.
    """
    @property
    def least_rounds(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def rounds(self) -> int: ...

class GpuCounts:
    """
    What the emulator counted of a kernel.
    """
    @property
    def barriers(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def busiest_bytes(self) -> int: ...
    @property
    def exponentials(self) -> int: ...
    @property
    def first_lookups(self) -> int: ...
    @property
    def later_lookups(self) -> int: ...
    @property
    def launches(self) -> int: ...
    @property
    def operands(self) -> GpuShared: ...
    @property
    def other(self) -> GpuShared: ...
    @property
    def products(self) -> int: ...
    @property
    def spans(self) -> int: ...
    @property
    def traffic(self) -> dict[str, GpuTraffic]: ...
    @property
    def working_blocks(self) -> int: ...

class SeenPages:
    """
    What one row set sees of one segment.
    """
    def __init__(
        self,
        pages: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        lo: typing.SupportsInt | typing.SupportsIndex,
        hi: typing.SupportsInt | typing.SupportsIndex,
        offset: typing.SupportsInt | typing.SupportsIndex,
        base: typing.SupportsInt | typing.SupportsIndex,
        stride: typing.SupportsInt | typing.SupportsIndex,
        own: bool,
    ) -> None: ...

class RowSet:
    """
    Query rows that see the same.
    """
    def __init__(
        self,
        query_len: typing.SupportsInt | typing.SupportsIndex,
        seen: collections.abc.Sequence[SeenPages],
    ) -> None: ...

def append(
    plan: Plan, k: Rows, v: Rows, pool: Pool, threads: typing.SupportsInt | typing.SupportsIndex
) -> None: ...
def attention(plan: Plan, pool: Pool, call: AttentionCall) -> None: ...
def copy_tokens(plan: Plan, pool: Pool) -> None: ...
def count_emulated(on: bool) -> None: ...
def emulated_counts() -> dict[str, GpuCounts]: ...
def force_instruction_set(name: str) -> None: ...
def force_own_workers(own: bool) -> None: ...
def gpu(emulated: bool) -> GpuBackend: ...
def has_openmp() -> bool: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def map_file(
    data: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
    file: typing.SupportsInt | typing.SupportsIndex,
    offset: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def merge(
    *,
    parts: collections.abc.Sequence[Rows],
    part_lse: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    out: Rows,
    lse: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    heads: typing.SupportsInt | typing.SupportsIndex,
    dim: typing.SupportsInt | typing.SupportsIndex,
    dtype: DType,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def most_vocab() -> int: ...
def plan(
    row_sets: collections.abc.Sequence[RowSet], page_size: typing.SupportsInt | typing.SupportsIndex
) -> Plan: ...
def populate(
    data: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def random_bits(
    key: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex
) -> int: ...
def row_draw_bytes() -> int: ...
def run_broken_kernel(name: str) -> str: ...
def sample(call: SampleCall) -> None: ...
def set_emulated_device(
    capability: typing.SupportsInt | typing.SupportsIndex,
    multiprocessors: typing.SupportsInt | typing.SupportsIndex,
    shared_per_block: typing.SupportsInt | typing.SupportsIndex,
    shared_per_multiprocessor: typing.SupportsInt | typing.SupportsIndex,
    most_part_bytes: typing.SupportsInt | typing.SupportsIndex,
    seed: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def use_huge_pages(
    data: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...

AWAY_PAGE: int = -2
code_group: int = 32
