"""Tokens from rows of scores: temperature, top-k, top-p and min-p, and the draw, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apr import _core
from apr.errors import InvalidInput
from apr.ops import device as gpu
from apr.ops.pools import dtype_of

# RowDraw of csrc/kernels/params.h.
_RECORD = np.dtype(
    [
        ("key", "u8"),
        ("count", "u8"),
        ("tail", "f8"),
        ("temperature", "f4"),
        ("min_p", "f4"),
        ("top_k", "i4"),
    ],
    align=True,
)
assert _RECORD.itemsize == _core.row_draw_bytes()

Numbers = Any  # one for all rows, or a sequence, array or tensor of one for each


class Draws:
    """How a token of each of `rows` rows is drawn; every option is a number, or one for each row.

    temperature: 0 takes the likeliest token, of equals the first. top_k: 0 for none. top_p: 1 for
    none. min_p: 0 for none, else the least probability relative to the likeliest token's. What is
    left is what transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper and
    MinPLogitsWarper leave, in this order, but for the rounding of their float32 sums at a border;
    of tokens that are equal where top-p cuts, the last ones.
    key, count: the random number is a function of both (0 to 2^64 - 1) and of nothing else.
    """

    def __init__(
        self,
        rows: int,
        *,
        temperature: Numbers = 1.0,
        top_k: Numbers = 0,
        top_p: Numbers = 1.0,
        min_p: Numbers = 0.0,
        key: Numbers = 0,
        count: Numbers = 0,
    ) -> None:
        self.table: NDArray[Any] = np.zeros(rows, _RECORD)
        with np.errstate(under="ignore", over="ignore"):
            given = _column("temperature", temperature, rows, 0.0, None)
            self.table["temperature"] = given
            taken = self.table["temperature"]
            if not (((taken > 0) == (given > 0)) & np.isfinite(taken)).all():
                raise InvalidInput(
                    f"temperature: got {given[given > 0].max()}; expected 0, or a number that "
                    "float32 can hold"
                )
            share = _column("top_p", top_p, rows, 0.0, 1.0)
            # 1 - 0.8 is a little less than 0.2: a fifth of the mass would not fit into it.
            self.table["tail"] = np.where(share < 1.0, 1.0 - share + 2.0**-50, 0.0)
        self.table["min_p"] = _column("min_p", min_p, rows, 0.0, 1.0)
        self.table["top_k"] = _integers("top_k", top_k, rows, (1 << 31) - 1)
        self.table["key"] = _integers("key", key, rows, (1 << 64) - 1)
        self.table["count"] = _integers("count", count, rows, (1 << 64) - 1)

    def __len__(self) -> int:
        return len(self.table)


def _column(
    name: str, given: Numbers, rows: int, least: float, most: float | None
) -> NDArray[np.float64]:
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name}: got {given!r:.80}; expected numbers") from error
    if values.shape not in ((), (rows,)):
        raise InvalidInput(f"{name}: got {list(values.shape)}; expected one, or [{rows}]")
    fine = np.isfinite(values) & (values >= least)
    bad = ~(fine if most is None else fine & (values <= most))
    if bad.any():
        span = f"{least} or more" if most is None else f"{least} to {most}"
        raise InvalidInput(f"{name}: got {values[bad].flat[0]}; expected {span}")
    return np.broadcast_to(values, (rows,))


def _integers(name: str, given: Numbers, rows: int, most: int) -> NDArray[np.uint64]:
    if isinstance(given, (Tensor, np.ndarray)):
        given = given.tolist()
    values = list(given) if isinstance(given, Sequence) else [given] * rows
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise InvalidInput(f"{name}: got {value!r}; expected a whole number")
        if not 0 <= value <= most:
            raise InvalidInput(f"{name}: got {value}; expected 0 to {most}")
    if len(values) != rows:
        raise InvalidInput(
            f"{name}: got {len(values)}; expected one, or one for each of {rows} rows"
        )
    return np.array(values, dtype=np.uint64)


@dataclass(frozen=True)
class Sampled:
    """What `sample` brings, [rows] each, on the device of the scores.

    Log-probabilities and entropy are natural.
    """

    tokens: Tensor  # int64; -1 where a row has nothing to draw from: NaN, +inf, or -inf alone
    logprobs: Tensor  # float32, of the token by the logits, before processors and `Draws`
    drawn_logprobs: Tensor  # float32, among the tokens that were left
    entropies: Tensor  # float32, of the logits
    memory: Tensor  # uint8, all of these

    @classmethod
    def of(cls, memory: Tensor) -> Sampled:
        """The parts of `memory` [20 * rows]."""
        rows = len(memory) // 20
        tokens, floats = memory[: 8 * rows].view(torch.int64), memory[8 * rows :]
        logprobs, drawn, entropies = floats.view(torch.float32).view(3, rows)
        return cls(tokens, logprobs, drawn, entropies, memory)

    def cpu(self) -> Sampled:
        """The same in host memory, by one copy."""
        return self if self.memory.device.type == "cpu" else Sampled.of(self.memory.cpu())


def _check(name: str, x: Tensor, rows: int, vocab: int, device: torch.device) -> None:
    if tuple(x.shape) != (rows, vocab) or x.device != device:
        raise InvalidInput(
            f"{name}: got {list(x.shape)} on {x.device}; expected [{rows}, {vocab}] on {device}"
        )
    if x.stride(1) != 1:
        raise InvalidInput(
            f"{name}: got strides {x.stride()}; expected a contiguous last dimension"
        )


def sample(scores: Tensor, draws: Draws | None = None, *, logits: Tensor | None = None) -> Sampled:
    """A token for each row of scores [rows, vocab], float32, bfloat16 or float16, read as they are.

    logits: the same before a logits processor changed them, in any of these dtypes; by default the
    scores. The tokens are the same in any company, on any device and with any number of processor
    threads: weights are summed up as integers, and random numbers are counter-based (Philox
    4x32-10, Salmon et al., SC 2011). Raises InvalidInput for shapes and dtypes.
    """
    if scores.ndim != 2 or not 0 < scores.shape[1] <= _core.most_vocab():
        raise InvalidInput(
            f"sample: got scores {list(scores.shape)}; expected [rows, vocab] of 1 to "
            f"{_core.most_vocab()} tokens"
        )
    rows, vocab = scores.shape
    logits = scores if logits is None else logits
    draws = Draws(rows) if draws is None else draws
    if len(draws) != rows:
        raise InvalidInput(f"sample: got {len(draws)} draws for {rows} rows of scores")
    _check("sample: scores", scores, rows, vocab, scores.device)
    _check("sample: logits", logits, rows, vocab, scores.device)
    backend = gpu.backend(scores.device)
    memory = torch.empty(20 * rows, dtype=torch.uint8, device=scores.device)
    sampled = Sampled.of(memory)
    table = gpu.uploaded(draws.table.view(np.uint8), scores.device)
    call = _core.SampleCall(
        scores=scores.data_ptr(),
        row_stride=scores.stride(0),
        dtype=dtype_of(scores.dtype, "sample: scores"),
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        logits_dtype=dtype_of(logits.dtype, "sample: logits"),
        rows=rows,
        vocab=vocab,
        draws=table.data_ptr(),
        tokens=sampled.tokens.data_ptr(),
        logprobs=sampled.logprobs.data_ptr(),
        drawn_logprobs=sampled.drawn_logprobs.data_ptr(),
        entropies=sampled.entropies.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if backend is None:
        _core.sample(call)
        return sampled
    with gpu.on(scores.device):
        backend.sample(call, gpu.stream(scores.device))
    return sampled
