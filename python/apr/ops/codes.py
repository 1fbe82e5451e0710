"""Keys and values in 8 bits: how numbers become codes, and codes numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput

# What a session can keep numbers in, by the names that commands and files have for it.
KV_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
_CODES = {torch.int8: _core.Codes.int8, torch.float8_e4m3fn: _core.Codes.float8}
_HIGHEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
GROUP = int(_core.code_group)  # numbers that share a scale


def is_coded(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype hold codes."""
    return dtype in _CODES


def codes_of(dtype: torch.dtype) -> _core.Codes:
    """The extension's name of how numbers are kept in a dtype."""
    return _CODES.get(dtype, _core.Codes.none)


def check_kv_dtype(kv_dtype: object) -> None:
    """Raise InvalidInput for what pages cannot keep numbers in."""
    if not any(kv_dtype is dtype for dtype in (None, *_CODES)):
        names = ", ".join(map(str, _CODES))
        raise InvalidInput(
            f"kv_dtype: got {kv_dtype!r}; expected None (as the model computes) or one of {names}"
        )


def encode(x: Tensor, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [..., head_dim] as codes of the same shape and scales [..., groups] in float32, a
    group for each 32 numbers (the last may be smaller), as in llama.cpp's q8_0.

    A scale is the largest magnitude of its group over the highest code (127, or 448 in e4m3); codes
    are the numbers over it, rounded to nearest, ties to even. A group that is not finite has the
    scale NaN. What `append` does, bit by bit. (The largest numbers of float32 itself come back
    infinite: their scale is rounded.)
    """
    if kv_dtype not in _CODES or not x.ndim or not x.shape[-1]:
        raise InvalidInput(
            f"encode: got {list(x.shape)} for {kv_dtype}; expected numbers [..., head_dim] and "
            f"one of {', '.join(map(str, _CODES))}"
        )
    dim, highest = x.shape[-1], _HIGHEST[kv_dtype]
    numbers = _grouped(x.float())
    top = numbers.abs().amax(-1)
    scales = torch.where(top.isfinite(), top / highest, torch.nan)
    over = (numbers / scales[..., None]).clamp(-highest, highest)
    over = torch.where(scales[..., None] > 0, over, 0.0)
    codes = (over.round() if kv_dtype == torch.int8 else over).to(kv_dtype)
    return codes.flatten(-2)[..., :dim].contiguous(), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes [..., head_dim] stand for, as attention reads them."""
    numbers = _grouped(codes.float()) * scales[..., None]
    return numbers.flatten(-2)[..., : codes.shape[-1]].to(dtype).contiguous()


def _grouped(x: Tensor) -> Tensor:
    """[..., groups, GROUP], filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP))
    return padded.reshape(*x.shape[:-1], groups_of(x.shape[-1]), GROUP)


def groups_of(head_dim: int) -> int:
    """Scales of a token and head."""
    return -(-head_dim // GROUP)
