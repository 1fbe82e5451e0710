"""What was measured of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from apr.errors import InvalidInput, UnsupportedRope
from apr.hf.far import Reach
from apr.hf.latent import Latent
from apr.hf.layer_states import StateSpec
from apr.ops import Pool, Rotation, empty_pool
from apr.ops.codes import check_kv_dtype, groups_of
from apr.ops.device import uploaded

# Names under which attention calls bring their sinks.
SINKS = ("s_aux", "sinks")


@dataclass(frozen=True)
class LayerSpec:
    """One attention call of a forward, in call order."""

    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    rotation: Rotation | None
    window: int | None
    chunk: int | None
    device: torch.device  # of its calls; its pool lies there too
    # Where latents are kept, heads and dimensions are theirs, and values the keys themselves.
    latent: Latent | None = None


@dataclass(frozen=True)
class ModelSpec:
    """What the probe found out about a model."""

    layers: tuple[LayerSpec, ...]
    can_rotate: bool
    position_limit: int | None  # from here on all frequencies are others
    reach: Reach
    vocab_size: int
    dtype: torch.dtype
    device: torch.device  # where ids go in, and logits are taken
    spread: bool  # weights lie on several devices, between which hooks carry what layers need
    keeps_rows: bool  # the forward takes `logits_to_keep`
    takes_positions: bool = True  # the forward takes `position_ids`
    states: StateSpec | None = None  # where more is kept for a thread than keys and values
    # What a session keeps keys and values in, where that is not the dtype that they come in.
    kv_dtype: torch.dtype | None = None

    @property
    def by_rows(self) -> bool:
        """Whether the model attends by itself, each thread on a row of its own cache."""
        return self.states is not None and not self.states.attends

    @property
    def why(self) -> str:
        """Why it does; empty where it does not."""
        return "" if self.states is None else self.states.reason

    @property
    def no_keys(self) -> str:
        """Why no thread can see what others have stored; empty where it can."""
        if self.states is None:
            return ""
        why = f" (it runs by rows of its own cache: {self.why})" if self.by_rows else ""
        return (
            "this model keeps a state of all that a thread has read, and it has not read the keys "
            f"of others; expected forks, trims, and joins with reencode=True{why}"
        )

    # A model that runs here tells its logits.
    no_logits = no_logprobs = ""

    @property
    def devices(self) -> list[torch.device]:
        """Where layers lie, each device once; that of ids where the model has no attention."""
        return list(dict.fromkeys(x.device for x in self.layers)) or [self.device]

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return sum(map(self.bytes_on, self.devices))

    def bytes_on(self, device: torch.device) -> int:
        """KV bytes of one token over the layers that lie there."""
        kept = self.dtype if self.kv_dtype is None else self.kv_dtype
        scale = 0 if self.kv_dtype is None else torch.float32.itemsize
        return sum(
            x.kv_heads * (dim * kept.itemsize + groups_of(dim) * scale)
            for x in self.layers
            for dim in ((x.head_dim,) if x.latent else (x.head_dim, x.head_dim_v))
            if x.device == device
        )

    def rows_to_keep(self, rows: Sequence[int]) -> Tensor | list[int]:
        """`logits_to_keep` for these rows. Hooks would carry a tensor to where ids go, and the head
        may lie elsewhere: numbers serve it anywhere.
        """
        if self.spread:
            return list(rows)
        return uploaded(list(rows), self.device)

    def kept_in(self, kv_dtype: torch.dtype | None) -> ModelSpec:
        """The same for a session that keeps keys and values so; raises InvalidInput where it
        cannot.
        """
        check_kv_dtype(kv_dtype)
        if kv_dtype is not None and (self.by_rows or not self.layers):
            why = self.why or "it has no attention"
            raise InvalidInput(
                f"kv_dtype: got {kv_dtype} for a model whose keys and values lie in no pages "
                f"({why}); leave it out"
            )
        return replace(self, kv_dtype=kv_dtype)

    def check_options(self, invariant: bool, checkpoint_tokens: int) -> None:
        """Raise InvalidInput for options of a session that layer states cannot honour."""
        if self.states is None:
            return
        if invariant and self.by_rows:
            raise InvalidInput(
                "invariant: got True for a model whose attention is its own, in batches that "
                f"change; leave it False ({self.why})"
            )
        if checkpoint_tokens and self.states.one_token:
            raise InvalidInput(
                f"checkpoint_tokens: got {checkpoint_tokens} for a model that takes one token at a "
                "time behind a state: each prompt would run token by token; leave it 0"
            )

    def linears(self, model: nn.Module) -> list[nn.Linear | None]:
        """Of each layer that keeps latents, the linear layer that they go through; raises
        AttributeError where one is not what was measured.
        """
        return [None if x.latent is None else x.latent.linear_of(model) for x in self.layers]

    def make_pools(self, pages: int, page_size: int) -> list[Pool]:
        """A pool for each layer, of pages that hold nothing yet."""
        return [self.make_pool(layer, pages, page_size) for layer in range(len(self.layers))]

    def make_pool(self, layer: int, pages: int, page_size: int) -> Pool:
        """The pool of one layer."""
        x = self.layers[layer]
        return empty_pool(
            pages,
            x.kv_heads,
            x.head_dim,
            self.dtype,
            x.device,
            page_size,
            x.head_dim_v,
            x.latent is not None,
            self.kv_dtype,
        )

    def check_position(self, furthest: int) -> None:
        """Raise UnsupportedRope where a position lies past what the model's frequencies hold
        for.
        """
        if self.position_limit is not None and furthest >= self.position_limit:
            raise UnsupportedRope(
                f"step: position {furthest} passes {self.position_limit}, where this model's "
                "rope_type (longrope or dynamic) changes all frequencies at once, those of cached "
                "keys too; keep threads shorter"
            )

    def check_step(self, furthest: int, rows: int) -> None:
        """Raise UnsupportedRope for a forward of so many rows, up to position `furthest`."""
        self.check_position(furthest)
        past = self.reach.past
        if past is not None and max(furthest, rows - 1) >= past:
            raise UnsupportedRope(
                f"step: position {furthest} in a forward of {rows} rows passes {past}, where this "
                "model scales its queries by how much its own cache holds, of which steps of many "
                f"threads have none; keep threads, and step_tokens, shorter than {past}, or use "
                "apr.Cache in generate()"
            )

    def check_turn(self, furthest: int) -> None:
        """Raise UnsupportedRope where segments are read away from where they were written, by or as
        what stands at position `furthest`.
        """
        turning = self.reach.turning
        if turning is not None and furthest >= turning:
            raise UnsupportedRope(
                f"step: a segment is read away from where it was written, at position {furthest}; "
                f"from {turning} on this model scales queries by their position, which re-rotation "
                "does not undo; keep segments at their written positions"
            )
