"""A session's file: safetensors, with JSON in its header. Each tensor begins at a page of memory,
so that it can be mapped instead of read: safetensors' own writer packs them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput

FORMAT = "apr threads 4"
_ALIGNED = 4096  # bytes
_FILLING = "behind "  # names of what fills up
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def write(path: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    """All of it, or what was there before. `text` is JSON."""
    if not path.parent.is_dir():
        raise InvalidInput(f"save: {path.parent} is not a folder; make it first")
    filled: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        filled[name] = tensor.contiguous()
        if tensor.nbytes % _ALIGNED:
            size = _ALIGNED - tensor.nbytes % _ALIGNED
            filled[_FILLING + name] = torch.zeros(size, dtype=torch.uint8, device="cpu")
    beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with beside.open("wb") as file:
            file.write(_header(text, filled))
            for tensor in filled.values():
                file.write(_bytes_of(tensor))
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _header(text: str, tensors: Mapping[str, Tensor]) -> bytes:
    told = {"format": FORMAT, "session": text, "digest": _digest(text, tensors)}
    header: dict[str, Any] = {"__metadata__": told}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    line = json.dumps(header).encode()
    line += b" " * (-(8 + len(line)) % _ALIGNED)
    return len(line).to_bytes(8, "little") + line


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


class Opened(NamedTuple):
    """What a file holds."""

    told: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path
    stamp: tuple[int, ...]


def read(path: Path) -> Opened:
    """A file that is whole."""
    try:
        stamp = _stamp(os.stat(path))
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"open: {path} cannot be read, or is cut short: {error}") from error
    if header.get("format") != FORMAT:
        raise InvalidInput(
            f"open: {path} has the format {header.get('format')!r}; expected {FORMAT!r}, as "
            "session.save writes it"
        )
    text = header.get("session", "")
    if header.get("digest") != _digest(text, tensors):
        raise InvalidInput(f"open: {path} was altered since it was saved; save it again")
    return Opened(json.loads(text), tensors, path, stamp)


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def map_pages(opened: Opened, sides: Mapping[str, Tensor]) -> None:
    """Let the first pages of pools, by the names of what is saved of them, be those of the file:
    memory that all who map it share until they write there, and then have a copy of their own.
    """
    with opened.path.open("rb") as file:
        if _stamp(os.fstat(file.fileno())) != opened.stamp:
            raise InvalidInput(
                f"open: {opened.path} was changed while it was opened; open it again"
            )
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, side in sides.items():
            begin, end = header[name]["data_offsets"]
            whole = (end - begin) // mmap.PAGESIZE * mmap.PAGESIZE
            offset = 8 + length + begin
            if offset % mmap.PAGESIZE:
                raise InvalidInput(
                    f"open: {opened.path} was not written for pages of {mmap.PAGESIZE} bytes, as "
                    "this system has them; leave mapped out"
                )
            _core.map_file(side.data_ptr(), whole, file.fileno(), offset)
            rest = opened.tensors[name].reshape(-1).view(torch.uint8)[whole:]
            side.reshape(-1).view(torch.uint8)[whole : end - begin] = rest
