"""Keys and values of one layer, in pages."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.ops import device as gpu
from apr.ops.codes import check_kv_dtype, codes_of, decode, groups_of, is_coded
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
    """Keys and values of one layer: k [pages, kv_heads, page_size, head_dim], v likewise.

    Where they are int8 or float8_e4m3fn they are codes (`ops.encode`): `scales` are those of k and
    of v, [pages, kv_heads, page_size, groups] in float32, and `dtype` is what attention reads them
    as.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        scales: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = k.dtype if dtype is None else dtype
        number = dtype_of(self.dtype, "pool")
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
        _check_scales(k, v, scales, self.dtype)
        if on_gpu:
            gpu.check_pool(k, v, self.dtype)
        self.k, self.v, self.scales = k, v, scales
        self.num_pages, self.num_kv_heads, self.page_size, self.head_dim = k.shape
        self.head_dim_v = int(v.shape[3])
        self._memory = self._addresses()
        k_scales, v_scales = (x.data_ptr() for x in scales) if scales else (0, 0)
        self.core = _core.Pool(
            k=k.data_ptr(),
            v=v.data_ptr(),
            k_scales=k_scales,
            v_scales=v_scales,
            num_pages=self.num_pages,
            kv_heads=self.num_kv_heads,
            page_size=self.page_size,
            head_dim_k=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=number,
            codes=codes_of(k.dtype),
        )

    @property
    def sides(self) -> dict[str, Tensor]:
        """Every tensor that pages lie in, [pages, kv_heads, page_size, ...], by name."""
        named = {"k": self.k}
        if self.scales is not None:
            named["k_scales"] = self.scales[0]
        if self.v is not self.k:
            named["v"] = self.v
            if self.scales is not None:
                named["v_scales"] = self.scales[1]
        return named

    def _addresses(self) -> tuple[int, ...]:  # asked by every call of a kernel
        scales = self.scales or ()
        return self.k.data_ptr(), self.v.data_ptr(), *(x.data_ptr() for x in scales)

    def read(self, pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, kv_heads, head_dim] of tokens at (page, slot), as attention
        reads them.
        """
        k, v = self.k[pages, :, slots], self.v[pages, :, slots]
        if self.scales is None:
            return k, v
        of_k, of_v = (x[pages, :, slots] for x in self.scales)
        return decode(k, of_k, self.dtype), decode(v, of_v, self.dtype)

    def check_memory(self) -> None:
        """Raise InvalidInput where its tensors are no longer those that the pool was made of."""
        if self._addresses() != self._memory:
            raise InvalidInput(
                "pool: its tensors were resized or replaced; make a new Pool of the tensors that "
                "hold the tokens"
            )

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token in this layer."""
        sides = self.sides.values()
        return sum(s.shape[1] * math.prod(s.shape[3:]) * s.element_size() for s in sides)

    def populate(self, first: int, end: int) -> None:
        """Make the memory of pages [first, end) present, unchanged, while others may use it."""
        for side in self.sides.values():
            page_bytes = side[0].numel() * side.element_size()
            _core.populate(side.data_ptr() + first * page_bytes, (end - first) * page_bytes)


def _check_scales(
    k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> None:
    if not is_coded(k.dtype):
        if scales is not None or dtype != k.dtype:
            raise InvalidInput(
                f"pool: got scales or dtype {dtype} with numbers of {k.dtype}; expected them with "
                "codes (int8 or float8_e4m3fn) alone"
            )
        return
    if not isinstance(scales, tuple) or len(scales) != 2:
        raise InvalidInput(
            f"pool: got codes ({k.dtype}) without the scales of keys and of values; give a pair "
            "(k_scales, v_scales)"
        )
    for side, x in zip((k, v), scales, strict=True):
        want = (*side.shape[:3], groups_of(side.shape[3]))
        same = (x.dtype, x.device, tuple(x.shape)) == (torch.float32, k.device, want)
        if not (same and x.is_contiguous()):
            raise InvalidInput(
                f"pool: got scales {list(x.shape)} {x.dtype} on {x.device}; expected contiguous "
                f"{list(want)} in float32 on {k.device}"
            )
    if (v is k) != (scales[0] is scales[1]):
        raise InvalidInput(
            "pool: got one tensor of two (k, v) or (k_scales, v_scales) and not of the others; "
            "values that are the keys have their scales, and others have their own"
        )


def _untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory as it comes: `torch.empty` fills it under `torch.use_deterministic_algorithms`."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu" and size:
        try:  # whole pages of memory, which files can be mapped to
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise InvalidInput(
                f"pool: the system gives no {size >> 20} MiB ({error}); ask for fewer pages "
                "(max_tokens)"
            ) from error
        return torch.frombuffer(memory, dtype=dtype).view(shape)
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
    kv_dtype: torch.dtype | None = None,
) -> Pool:
    """A pool of uninitialised pages, on huge pages of memory where the system gives them.

    `head_dim_v` is given where values are narrower than keys; with `values_are_keys` both are one
    tensor. `kv_dtype`: int8 or float8_e4m3fn keeps numbers of `dtype` as codes.
    """
    check_kv_dtype(kv_dtype)
    dims_v = head_dim if head_dim_v is None else head_dim_v
    if values_are_keys and dims_v != head_dim:
        raise InvalidInput(
            f"pool: got head_dim_v {dims_v} with values_are_keys; expected head_dim {head_dim}"
        )
    shape = (num_pages, num_kv_heads, page_size)
    kept = dtype if kv_dtype is None else kv_dtype
    scales = None
    with gpu.lasting():
        k = _untouched((*shape, head_dim), kept, device)
        v = k if values_are_keys else _untouched((*shape, dims_v), kept, device)
        if kv_dtype is not None:
            of_k = _untouched((*shape, groups_of(head_dim)), torch.float32, device)
            of_v = _untouched((*shape, groups_of(dims_v)), torch.float32, device)
            scales = (of_k, of_k if values_are_keys else of_v)
    pool = Pool(k, v, scales, dtype)
    for side in pool.sides.values() if k.device.type == "cpu" else ():
        _core.use_huge_pages(side.data_ptr(), side.numel() * side.element_size())
    return pool
