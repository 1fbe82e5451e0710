"""The kernels on a GPU, or on the emulated one: plans in device memory, and launches on torch's
stream.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.ops.codes import codes_of, is_coded
from apr.ops.pages import check_page_size

if TYPE_CHECKING:
    from apr.ops.pools import Pool

_DTYPES = {
    torch.float32: _core.DType.float32,
    torch.bfloat16: _core.DType.bfloat16,
    torch.float16: _core.DType.float16,
}
MOST_HEAD_DIM = 576
Host = Any  # a tensor or array in host memory, or a list
EMULATED = "cuda_emulated"  # the name by which machine.use_kernels knows it


def built(emulated: bool = False) -> _core.GpuBackend | None:
    """The CUDA kernels of this build, or the emulated GPU; None where it has none."""
    return _core.gpu(emulated)


def backend(device: torch.device) -> _core.GpuBackend | None:
    """The GPU back-end that serves tensors of a device; None where the CPU kernels do.

    Raises InvalidInput for a device that this build has no kernels for: nothing is ever copied
    silently.
    """
    if device.type == "cpu":
        return _core.gpu(True) if _core.instruction_set() == EMULATED else None
    built = _core.gpu(False) if device.type == "cuda" else None
    if built is None:
        raise InvalidInput(
            f"got device {device}, but this build has kernels for: cpu{_also_cuda()}; move it to "
            "the CPU, or install a build with CUDA kernels (python -m apr info)"
        )
    capability = built.capability(device.index or 0)
    if capability < 80:
        raise InvalidInput(
            f"got device {device} of compute capability {capability / 10}; the CUDA kernels of "
            f"this build ({built.architectures}) need 8.0 or newer; run the model on the CPU"
        )
    return built


def _also_cuda() -> str:
    built = _core.gpu(False)
    return "" if built is None else f", cuda ({built.architectures})"


def check_pool(k: Tensor, v: Tensor, dtype: torch.dtype) -> None:
    """Raise InvalidInput where no GPU kernel serves a pool of these."""
    dims = (int(k.shape[3]), int(v.shape[3]))
    if any(d % 8 or d > MOST_HEAD_DIM for d in dims):
        raise InvalidInput(
            f"pool: got head_dim {dims[0]} and {dims[1]}; the GPU kernels take a multiple of 8 up "
            f"to {MOST_HEAD_DIM}; run the model on the CPU"
        )
    halves = dtype in (torch.bfloat16, torch.float16)
    if is_coded(k.dtype) and not (halves and all(d % 16 == 0 and d <= 256 for d in dims)):
        raise InvalidInput(
            f"pool: got {k.dtype} of {dtype} with head_dim {dims[0]} and {dims[1]}; in 8 bits the "
            "GPU kernels take bfloat16 or float16 and head_dim a multiple of 16 up to 256; leave "
            "kv_dtype out, or convert the model"
        )
    check_page_size(int(k.shape[2]))
    gpu = backend(k.device)
    assert gpu is not None, "a pool that the CPU kernels serve"
    kind = Kind(dtype, codes_of(k.dtype), 1, 1, *dims, int(k.shape[2]), 0, 0, False)
    try:
        gpu.check(kind.core, k.device.index or 0)
    except ValueError as error:
        raise InvalidInput(f"pool: {error}") from None


def stream(device: torch.device) -> int:
    """torch's current stream of a device; the emulator has none."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches of the block go to this device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def lasting() -> contextlib.AbstractContextManager[Any]:
    """Tensors that are made in the block may be written at any time, whether the caller is in
    inference mode then or not.
    """
    return torch.inference_mode(False)


def pinned(x: Host, device: torch.device) -> Tensor:
    """Numbers of the host as a device can copy them while the host goes on."""
    host = torch.as_tensor(x, device="cpu")  # whatever torch's default device is
    return host if device.type == "cpu" else host.pin_memory()


def uploaded(x: Host, device: torch.device) -> Tensor:
    """Numbers of the host on a device. The copy takes its turn behind what the device was given
    before, and is not waited for: torch's own `to` would wait for all of it.
    """
    return pinned(x, device).to(device, non_blocking=True)


class Copies:
    """Numbers of the host, copied once to each device that asks for it: layers of one model may
    lie on several.
    """

    def __init__(self, x: Host) -> None:
        self._x = torch.as_tensor(x, device="cpu")
        self._there: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on this device."""
        if device not in self._there:
            self._there[device] = uploaded(self._x, device)
        return self._there[device]


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where its rows do not lie on 16 bytes."""
    fits = x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    fits = fits and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return x if fits else x.contiguous().clone()


class Pass(NamedTuple):
    """One pass over a plan's rows, in device memory."""

    core: _core.GpuPlan
    tables: Tensor  # uint8; begins with what `core.upload` holds
    parts: Tensor  # uint8; partial results


class Kind(NamedTuple):
    """What a layer's attention is, apart from its tensors; window, chunk 0: none."""

    dtype: torch.dtype
    codes: _core.Codes
    q_heads: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    page_size: int
    window: int
    chunk: int
    invariant: bool

    @property
    def core(self) -> _core.AttentionKind:
        return _core.AttentionKind(**{**self._asdict(), "dtype": _DTYPES[self.dtype]})


def kind_of(pool: Pool, heads: int, window: int, chunk: int, invariant: bool) -> Kind:
    """The kind of a layer with so many query heads."""
    dims = (pool.num_kv_heads, pool.head_dim, pool.head_dim_v, pool.page_size)
    return Kind(pool.dtype, codes_of(pool.k.dtype), heads, *dims, window, chunk, invariant)


def memory_of(core: _core.GpuPlan, device: torch.device) -> Pass:
    """Device memory for a plan, with its tables copied there."""
    tables = torch.empty(core.table_bytes, dtype=torch.uint8, device=device)
    refresh_tables(tables, core)
    parts = torch.empty(max(core.part_bytes, 1), dtype=torch.uint8, device=device)
    return Pass(core, tables, parts)


def refresh_tables(tables: Tensor, core: _core.GpuPlan) -> None:
    """Copy a plan's tables to their device memory."""
    upload = pinned(core.upload, tables.device)
    tables[: len(upload)].copy_(upload, non_blocking=True)


class DevicePlan:
    """A plan in the memory of the devices that use it, made once for all layers of one kind."""

    def __init__(self, core: _core.Plan, invariant: bool) -> None:
        self._core, self._invariant = core, invariant
        self._passes: dict[tuple[torch.device, Kind], list[Pass]] = {}
        self._slots: dict[torch.device, Tensor] = {}

    def adopt(self, device: torch.device, slots: Tensor, passes: dict[Kind, Pass]) -> None:
        """Take slots and passes that somebody else keeps up to date."""
        self._slots[device] = slots
        self._passes = {(device, kind): [one] for kind, one in passes.items()}

    def _prepare(self, gpu: _core.GpuBackend, device: torch.device, kind: Kind) -> list[Pass]:
        """Lay the plan out, copy it to the device, and run the device planner."""
        plans = gpu.plan(self._core, kind.core, device.index or 0)
        passes = [memory_of(core, device) for core in plans]
        for core, tables, _ in passes:
            core.prepare(tables.data_ptr(), stream(device))
        return passes

    def append(self, gpu: _core.GpuBackend, k: _core.Rows, v: _core.Rows, pool: Pool) -> None:
        """Write new keys and values to their pages."""
        device = pool.k.device
        if device not in self._slots:
            self._slots[device] = uploaded(self._core.slots, device)
        slots = self._slots[device]
        with on(device):
            gpu.append(k, v, pool.core, slots.data_ptr(), len(slots), stream(device))

    def copy_tokens(self, gpu: _core.GpuBackend, pool: Pool) -> None:
        """Do the token copies that a step planned."""
        device = pool.k.device
        copies = uploaded(self._core.copies, device)
        with on(device):
            gpu.copy_tokens(pool.core, copies.data_ptr(), len(copies), stream(device))

    def attention(
        self, gpu: _core.GpuBackend, pool: Pool, kind: Kind, call: _core.AttentionCall
    ) -> None:
        """Attention of a layer of one kind."""
        device = pool.k.device
        key = (device, kind)
        with on(device):
            if key not in self._passes:
                self._passes[key] = self._prepare(gpu, device, kind)
            for core, tables, parts in self._passes[key]:
                core.attention(tables.data_ptr(), parts.data_ptr(), pool.core, call, stream(device))
