"""A record of parallel threads as one flat sequence: ids, positions, mask and loss, as the runtime
saw them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apr.errors import InvalidInput
from apr.protocols.record import Record

_BLOCK = 128  # of a FlexAttention block mask


@dataclass(frozen=True)
class Flat:
    """One sequence in which every piece of a record stands once; N tokens, P pieces.

    Token i sees token j if `index[j] < seen[piece[i], piece[j]]`, or if both stand in one piece and
    j is not behind i: the ancestor mask of tree attention. Logits of token `sources[k]` choose
    `targets[k]`.
    """

    ids: Tensor  # int64 [N]
    position_ids: Tensor  # int64 [N]; threads side by side share positions
    piece: Tensor  # int32 [N]
    index: Tensor  # int32 [N]: place in its piece
    seen: Tensor  # int32 [P, P]: how many tokens of a piece another sees
    starts: Tensor  # int64 [P + 1]: where pieces begin
    sources: Tensor  # int64 [M], flat places
    targets: Tensor  # int64 [M], flat places of sampled tokens

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_mask(self) -> Tensor:
        """bool [N]: the tokens that the model chose; those that the runtime put in are left out."""
        mask = torch.zeros(len(self.ids), dtype=torch.bool, device="cpu")
        mask[self.targets] = True
        return mask

    def mask(self) -> Tensor:
        """bool [N, N], True where the row's token sees the column's; `attention_mask=mask[None,
        None]`.
        """
        piece, index = self.piece.long(), self.index
        visible = index < self.seen[piece][:, piece]
        own = (piece[:, None] == piece) & (index[:, None] >= index)
        return visible | own

    def mask_mod(self, device: torch.device | str = "cpu") -> Any:
        """The same mask as a function of indices, for `torch.nn.attention.flex_attention`."""
        piece, index = self.piece.long().to(device), self.index.to(device)
        seen = self.seen.to(device)

        def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (piece[q] == piece[k]) & (index[q] >= index[k])
            return own | (index[k] < seen[piece[q], piece[k]])

        return visible

    def block_mask(self, device: torch.device | str = "cpu") -> Any:
        """A FlexAttention `BlockMask`, made from the pieces: no [N, N] tensor is built, at any
        length.
        """
        from torch.nn.attention.flex_attention import BlockMask

        blocks = -(-len(self.ids) // _BLOCK)
        touched = np.zeros((blocks, blocks), dtype=bool)
        starts = self.starts.tolist()
        for row, seen in enumerate(self.seen.tolist()):
            first, last = starts[row], starts[row + 1]
            if first == last:
                continue
            rows = slice(first // _BLOCK, (last - 1) // _BLOCK + 1)
            touched[rows, rows] |= np.tri(rows.stop - rows.start, dtype=bool)
            for column, hi in enumerate(seen):
                if hi:
                    begin = starts[column]
                    touched[rows, begin // _BLOCK : (begin + hi - 1) // _BLOCK + 1] = True
        counts = torch.from_numpy(touched.sum(1)).to(torch.int32)
        order = torch.from_numpy(np.argsort(~touched, axis=1, kind="stable")).to(torch.int32)
        return BlockMask.from_kv_blocks(
            counts[None, None].to(device),
            order[None, None].to(device),
            BLOCK_SIZE=_BLOCK,
            mask_mod=self.mask_mod(device),
            seq_lengths=(len(self.ids), len(self.ids)),
        )


def flatten(record: Record) -> Flat:
    """One flat sequence of a record: a stock forward of it under its mask gives the runtime's
    logits.

    Raises InvalidInput where that cannot be: a key that two readers see at different positions (a
    join at summed positions), or a token that was sampled where there were no logits.
    """
    pieces = record.pieces
    if not record.begins_as_line:
        raise InvalidInput(
            "flatten: the run began on a thread that had joined others or had a view of its own; "
            "what its tokens saw is not in the record: begin with session.thread(ids)"
        )
    lengths = np.array([len(p.ids) for p in pieces], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    seen = np.zeros((len(pieces), len(pieces)), dtype=np.int32)
    sources: list[int] = []
    targets: list[int] = []
    for number, piece in enumerate(pieces):
        for other, hi, shift in piece.sees:
            if shift:
                raise InvalidInput(
                    f"flatten: piece {number} sees piece {other} {shift} positions from where it "
                    "was written, and a key has one position in a flat sequence; join at max "
                    "positions, re-encode, or train on a message"
                )
            seen[number, other] = hi
        start = int(starts[number])
        chosen = np.flatnonzero(piece.sampled)
        targets += (start + chosen).tolist()
        sources += (start + chosen - 1).tolist()
        if len(chosen) and chosen[0] == 0:
            if piece.follows is None:
                raise InvalidInput(
                    f"flatten: the first token of piece {number} was sampled after nothing; write "
                    "the tokens that open it with sampled=False"
                )
            sources[-len(chosen)] = int(starts[piece.follows[0]]) + piece.follows[1]
    index = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    positions = np.concatenate([p.position + np.arange(len(p.ids)) for p in pieces])
    return Flat(
        ids=torch.tensor([i for p in pieces for i in p.ids], dtype=torch.int64, device="cpu"),
        position_ids=torch.from_numpy(positions),
        piece=torch.from_numpy(np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)),
        index=torch.from_numpy(index),
        seen=torch.from_numpy(seen),
        starts=torch.from_numpy(starts),
        sources=torch.tensor(sources, dtype=torch.int64, device="cpu"),
        targets=torch.tensor(targets, dtype=torch.int64, device="cpu"),
    )


@dataclass(frozen=True)
class Batch:
    """Flat sequences as rows [B, N]: the arguments of a Hugging Face forward, and what its logits
    should say.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor  # bool [B, 1, N, N]
    sources: Tensor  # int64 [M] into the flattened [B * N]
    labels: Tensor  # int64 [M]: token ids
    rows: Tensor  # int64 [B]: which of the given sequences each row is

    def to(self, device: torch.device | str) -> Batch:
        """The same with all tensors on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def loss(self, logits: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of logits [B, N, vocab] on the sampled tokens; "none" gives one
        each, [M].
        """
        chosen = logits.flatten(0, 1)[self.sources].float()
        return torch.nn.functional.cross_entropy(chosen, self.labels, reduction=reduction)


def collate(flats: Sequence[Flat], pad: int = 0, multiple: int = 1) -> Batch:
    """Rows of one length, the longest rounded up to `multiple`; padding sees itself and is seen by
    nobody.
    """
    longest = -(-max(len(f) for f in flats) // multiple) * multiple
    ids = torch.full((len(flats), longest), pad, device="cpu")
    positions = torch.zeros(len(flats), longest, dtype=torch.int64, device="cpu")
    mask = torch.eye(longest, dtype=torch.bool, device="cpu").repeat(len(flats), 1, 1, 1)
    sources, labels = [], []
    for row, flat in enumerate(flats):
        n = len(flat)
        ids[row, :n] = flat.ids
        positions[row, :n] = flat.position_ids
        mask[row, 0, :n, :n] = flat.mask()
        sources.append(flat.sources + row * longest)
        labels.append(flat.ids[flat.targets])
    numbers = torch.arange(len(flats), device="cpu")
    return Batch(ids, positions, mask, torch.cat(sources), torch.cat(labels), numbers)


def microbatches(
    flats: Sequence[Flat], tokens: int, pad: int = 0, multiple: int = 64
) -> list[Batch]:
    """Batches of similar lengths, each of at most `tokens` places (or one row)."""
    groups: list[list[int]] = []
    for number in sorted(range(len(flats)), key=lambda i: -len(flats[i])):
        length = -(-len(flats[groups[-1][0]]) // multiple) * multiple if groups else 0
        if groups and length * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    made = [collate([flats[i] for i in group], pad, multiple) for group in groups]
    return [
        dataclasses.replace(batch, rows=torch.tensor(group, device="cpu"))
        for batch, group in zip(made, groups, strict=True)
    ]
