"""Layers whose keys and values come from one latent a token (MLA, DeepSeek-V2, arXiv 2405.04434):
the latent is kept, and the model's own matrix is absorbed into queries and outputs.

Keys and values are the same memory: a row is the latent and the part of the key that all heads
share. Kernels weigh that part among the values too, where it is not looked at, and need not know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apr.hf.ranks import local_part
from apr.ops import Rotation

WIDEST = 576  # head_dim of the kernels


def is_plain(module: nn.Module) -> bool:
    """Whether its output is its weight times its input: weight and nothing else may be absorbed."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    bias: Tensor | None = module.bias
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # Offloaded or quantised, a weight is no plain tensor here.
    weight = type(local_part(module.weight)) in (Tensor, nn.Parameter)
    return bias is None and weight and all(getattr(hook, "is_apr", False) for hook in hooks)


@dataclass(frozen=True)
class Latent:
    """How a layer's heads come from its latents.

    name: of the linear layer, of the whole model, whose input is the latent and whose output holds,
    head by head, the first dimensions of the key and the value; part: how many of the key. The rest
    of the key is one for all heads.
    """

    name: str
    rank: int
    part: int

    def linear_of(self, model: nn.Module) -> nn.Linear:
        """The layer itself; raises AttributeError where it is no longer what was measured: wrapped
        by an adapter, with a bias, a hook of somebody else's or a forward of its own.
        """
        linear = model.get_submodule(self.name)
        if not is_plain(linear):
            raise AttributeError(self.name)
        assert isinstance(linear, nn.Linear)
        return linear

    def absorb(
        self, linear: nn.Linear, latent: Tensor, q: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q [lines, heads, tokens, head_dim] as it scores latents, and what is kept of each token,
        [lines, 1, tokens, rank + rest]: the key of one head that stands for those of all, and the
        value too.
        """
        weight = self._heads(linear, q.shape[1], q.dtype)[:, : self.part]
        absorbed = torch.matmul(q[..., : self.part], weight)
        kept = latent.reshape(q.shape[0], 1, q.shape[2], self.rank).to(q.dtype)
        kept = torch.cat([kept, k[:, :1, :, self.part :]], -1)
        return torch.cat([absorbed, q[..., self.part :]], -1), kept

    def expand(self, linear: nn.Linear, out: Tensor) -> Tensor:
        """Sums of what is kept [lines, tokens, heads, rank + rest] -> of values [lines, tokens,
        heads, head_dim_v].
        """
        weight = self._heads(linear, out.shape[2], out.dtype)[:, self.part :]
        latents = out[..., : self.rank].transpose(1, 2)
        return torch.matmul(latents, weight.transpose(1, 2)).transpose(1, 2)

    def _heads(self, linear: nn.Linear, heads: int, dtype: torch.dtype) -> Tensor:
        """Its weight as [heads, part + head_dim_v, rank]; of this rank's heads."""
        return local_part(linear.weight).to(dtype).view(heads, -1, self.rank)

    def turned(self, rotation: Rotation | None) -> Rotation | None:
        """The rotation of queries that score latents."""
        if rotation is None:
            return None
        first, end = (x - self.part + self.rank for x in rotation.dims)
        return Rotation(rotation.inv_freq, (first, end), rotation.interleaved)


class Linears:
    """What the linear layers inside of attention modules read and wrote, while watched."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        # What adapters wrap is not the layer's own child: its output is not all of theirs.
        self._modules = {
            linear: id(module)
            for module in modules
            for linear in module.children()
            if is_plain(linear)
        }
        self._ident = threading.get_ident()
        self._seen: dict[int, list[tuple[str, nn.Linear, Tensor, Tensor]]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the forwards of this Python thread."""
        with ExitStack() as hooks:
            for linear in self._modules:
                hooks.callback(linear.register_forward_hook(self._see).remove)
            yield

    def _see(self, linear: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> None:
        if threading.get_ident() != self._ident:  # a call of the user's own meanwhile
            return
        seen = self._seen.setdefault(self._modules[linear], [])
        given, out = (local_part(x.detach()) for x in (args[0], out))
        seen.append((self._names[id(linear)], linear, given, out))

    def find(self, module: Any, q: Tensor, k: Tensor, v: Tensor, rotation: Any) -> Latent | None:
        """The latent of an attention call that came of `module`; None where there is none, or where
        keeping it would not save memory. q, k, v: [1, heads, tokens, dim].
        """
        _, heads, tokens, dim = k.shape
        for name, linear, given, out in self._seen.get(id(module), ()):
            part = out.shape[-1] // heads - v.shape[-1]
            rank, rest = given.shape[-1], dim - part
            if (
                linear.weight.device != k.device
                or out.shape[:-1].numel() != tokens
                or out.shape[-1] % heads
                or q.shape[1] != heads
                or not 0 < part <= dim
                or rank + rest >= min(heads * (dim + v.shape[-1]), WIDEST + 1)
                or (rank + rest) % 8
                or (rotation is not None and rotation.dims[0] < part)
            ):
                continue
            both = out.reshape(tokens, heads, -1).transpose(0, 1)[None]
            shared = k[..., part:]
            if (
                torch.equal(both[..., :part], k[..., :part])
                and torch.equal(both[..., part:], v)
                and torch.equal(shared, shared[:, :1].expand_as(shared))
            ):
                return Latent(name, rank, part)
        return None
