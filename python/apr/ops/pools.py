"""Keys and values of one layer, in pages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.ops import device as gpu
from apr.ops.pages import PAGE_SIZE

_DTYPES = {
    torch.float32: _core.DType.float32,
    torch.bfloat16: _core.DType.bfloat16,
    torch.float16: _core.DType.float16,
}


def dtype_of(dtype: torch.dtype, who: str) -> _core.DType:
    """The extension's name of a dtype; raises InvalidInput for one that no kernel takes."""
    if dtype not in _DTYPES:
        raise InvalidInput(
            f"{who}: got dtype {dtype}; expected float32, bfloat16 or float16; convert the model"
        )
    return _DTYPES[dtype]


class Pool:
    """Keys and values of one layer: k [pages, kv_heads, page_size, head_dim], v likewise."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        dtype = dtype_of(k.dtype, "pool")
        on_gpu = gpu.backend(k.device) is not None
        same = (v.dtype, v.device, v.shape[:3]) == (k.dtype, k.device, k.shape[:3])
        if k.ndim != 4 or v.ndim != 4 or not (same and k.is_contiguous() and v.is_contiguous()):
            raise InvalidInput(
                f"pool: got k {list(k.shape)} {k.dtype} and v {list(v.shape)} {v.dtype}; expected "
                "two contiguous [pages, kv_heads, page_size, head_dim] of one dtype on one device"
            )
        if 0 in k.shape[1:] or v.shape[3] == 0:
            raise InvalidInput(
                f"pool: got k {list(k.shape)} and v {list(v.shape)}; expected at least one KV "
                "head, slot and dimension"
            )
        if on_gpu:
            gpu.check_pool(k, v)
        self.k, self.v = k, v
        self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = k.shape
        self.head_dim_v = int(v.shape[3])
        self._memory = (k.data_ptr(), v.data_ptr())
        self.core = _core.Pool(
            k=k.data_ptr(),
            v=v.data_ptr(),
            num_pages=self.num_pages,
            kv_heads=self.num_kv_heads,
            page_size=self.page_size,
            head_dim_k=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=dtype,
        )

    def check_memory(self) -> None:
        """Raise InvalidInput where k or v are no longer the tensors that the pool was made of."""
        if (self.k.data_ptr(), self.v.data_ptr()) != self._memory:
            raise InvalidInput(
                "pool: its tensors were resized or replaced; make a new Pool of the tensors that "
                "hold the tokens"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values: float32, bfloat16 or float16."""
        return self.k.dtype

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token in this layer."""
        dims = self.head_dim + (0 if self.v is self.k else self.head_dim_v)
        return self.num_kv_heads * dims * self.k.element_size()

    def populate(self, first: int, end: int) -> None:
        """Make the memory of pages [first, end) present, unchanged, while others may use it."""
        for side in (self.k, self.v):
            page_bytes = side[0].numel() * side.element_size()
            _core.populate(side.data_ptr() + first * page_bytes, (end - first) * page_bytes)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory as it comes: `torch.empty` fills it under `torch.use_deterministic_algorithms`."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype, device=device).set_(storage).view(shape)


def empty_pool(
    num_pages: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    page_size: int = PAGE_SIZE,
    head_dim_v: int | None = None,
    values_are_keys: bool = False,
) -> Pool:
    """A pool of uninitialised pages, on huge pages of memory where the system gives them.

    `head_dim_v` is given where values are narrower than keys; with `values_are_keys` both are one
    tensor.
    """
    dims_v = head_dim if head_dim_v is None else head_dim_v
    if values_are_keys and dims_v != head_dim:
        raise InvalidInput(
            f"pool: got head_dim_v {dims_v} with values_are_keys; expected head_dim {head_dim}"
        )
    shape = (num_pages, num_kv_heads, page_size)
    k = _untouched((*shape, head_dim), dtype, device)
    v = k if values_are_keys else _untouched((*shape, dims_v), dtype, device)
    pool = Pool(k, v)
    for side in {k, v} if k.device.type == "cpu" else ():
        _core.use_huge_pages(side.data_ptr(), side.numel() * side.element_size())
    return pool
