"""What one forward with an `apr.Cache` brings: which of its tokens are real, where they stand, what
is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apr.errors import InvalidInput
from apr.threads.thread import Thread

# Arguments whose rows say nothing about what a row's tokens are, beyond the tokens themselves.
_KNOWN = {"input_ids", "attention_mask", "position_ids", "logits_to_keep"}


@dataclass
class Call:
    """One forward: keyword arguments as the model gets them, and what they say of [batch, width]
    tokens.

    ids: token ids, zeros where the call brings embeddings. real: which of them are no padding.
    past: which of the [batch, length] places of earlier calls are seen. positions: of all tokens,
    None until they are known.
    """

    arguments: dict[str, Any]
    ids: Tensor
    real: Tensor
    past: Tensor
    positions: Tensor | None
    whole: bool = False  # it brings the text from the first token on, whatever is stored

    @property
    def masked(self) -> bool:
        """Whether it says which places are padding."""
        return self.arguments.get("attention_mask") is not None

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def texts(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [row[real].tolist() for row, real in zip(self.ids, self.real, strict=True)]

    def real_positions(self, row: int) -> list[int]:
        assert self.positions is not None
        positions: list[int] = self.positions[row][self.real[row]].tolist()
        return positions

    def own_positions(self, counts_padding: bool) -> Tensor:
        """[batch, width] positions that a model gives tokens by itself: their places, or real
        tokens counted.
        """
        if counts_padding:
            return (torch.arange(self.width, device="cpu") + self.past.shape[1]).expand_as(self.ids)
        everything = torch.cat([self.past, self.real], 1).long()
        return (everything.cumsum(1) - 1).clamp_min(0)[:, self.past.shape[1] :]

    def extras(self) -> dict[str, Tensor]:
        """Tensors beyond token ids and masks: images, token types, embeddings."""
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) and name not in _KNOWN
        }

    @property
    def spare_columns(self) -> int:
        """Columns at the beginning whose output nobody reads; 0 where that is not said."""
        keep = self.arguments.get("logits_to_keep")
        if self.arguments.get("output_hidden_states"):
            return 0
        return self.width - keep if isinstance(keep, int) and keep > 0 else 0

    @property
    def kept_columns(self) -> range:
        """The numbers of the others."""
        return range(self.spare_columns, self.width)

    def keys(self) -> list[Any]:
        """One key a row; rows of equal keys are given the same in every argument."""
        batch = self.ids.shape[0]
        keys: list[Any] = [
            (tuple(text), tuple(self.real_positions(i)), tuple(self.real[i].tolist()))
            for i, text in enumerate(self.texts())
        ]
        for value in self.extras().values():
            if value.ndim == 0 or value.numel() == 1:
                continue
            if value.shape[0] != batch:  # whose row is what cannot be told
                return list(range(batch))
            rows = [value[i].detach().cpu().contiguous().view(-1) for i in range(batch)]
            first: list[int] = []
            for i, row in enumerate(rows):
                first.append(next((j for j in range(i) if torch.equal(rows[j], row)), i))
            keys = [(key, same) for key, same in zip(keys, first, strict=True)]
        return keys

    def cut(self, columns: int) -> None:
        """Leave out the first `columns` tokens, which are stored already."""
        self.past = torch.cat([self.past, self.real[:, :columns]], 1)
        self.ids, self.real = self.ids[:, columns:], self.real[:, columns:]
        if self.positions is not None:
            self.positions = self.positions[:, columns:]
        self.arguments["input_ids"] = self.arguments["input_ids"][:, columns:]


def _is_whole(mask: Any, positions: Any, width: int) -> bool:
    """Whether a first call of generate() that had no prefill (drafts) brings its text from the
    first token on.

    The mask spans everything; where it hides nothing it may be left out, and the positions tell.
    """
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1] == width
    return isinstance(positions, Tensor) and positions.ndim == 2 and int(positions[0, 0]) == 0


def read_call(arguments: dict[str, Any], length: int, begun: bool, whole: bool = False) -> Call:
    """What the arguments say, for a cache of `length` places; `begun`: this is the first call of a
    generate(), `whole`: it is known to bring its text from the first token on.

    Raises InvalidInput for what a row of threads cannot mean.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeddings is None):
        raise InvalidInput("apr.Cache: expected input_ids, or inputs_embeds, and not both")
    if arguments.get("use_cache") is False:
        raise InvalidInput(
            "apr.Cache: got use_cache=False and a cache; stock would feed the whole text again "
            "behind what is stored: leave one of them out"
        )
    if arguments.get("output_attentions"):
        raise InvalidInput(
            "apr.Cache: got output_attentions; no attention matrix is ever made here: leave it "
            "out, or use the model without this cache"
        )
    if ids is None:
        assert embeddings is not None
        ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device="cpu")
    if ids.ndim != 2 or not ids.shape[1]:
        raise InvalidInput(
            f"apr.Cache: got ids {list(ids.shape)}; expected [batch, tokens] with at least one new "
            f"token (it holds {length} already: cache.crop(-n) takes the last n back, "
            "cache.reset() all)"
        )
    ids = ids.detach().cpu()
    batch, width = ids.shape
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    whole = whole or (begun and _is_whole(mask, positions, width))
    length = 0 if whole else length
    real = torch.ones(batch, length + width, dtype=torch.bool, device="cpu")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch:
            raise InvalidInput(
                "apr.Cache: got an attention_mask that is not [batch, tokens]; expected the 2-D "
                "padding mask of the tokenizer"
            )
        if mask.shape[1] < length + width:
            raise InvalidInput(
                f"apr.Cache: got an attention_mask of {mask.shape[1]} columns; expected "
                f"{length + width}: the {length} that it holds, then those of the {width} new "
                "tokens"
            )
        real = mask[:, : length + width].detach().cpu().bool()
    if isinstance(positions, Tensor) and positions.ndim == 3 and _is_text(positions):
        positions = positions[0]
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.ndim != 2:
            raise InvalidInput(
                "apr.Cache: got position_ids that are not [batch, tokens], or several a token that "
                "differ (images); of models that give tokens several positions only text is "
                "supported"
            )
        if positions.shape[0] not in (1, batch) or positions.shape[1] < width:
            raise InvalidInput(
                f"apr.Cache: got position_ids {list(positions.shape)}; expected [{batch}, "
                f"{width}], as ids"
            )
        positions = positions[:, -width:].detach().cpu().expand(batch, width)
    call = Call(arguments, ids, real[:, length:], real[:, :length], positions, whole)
    _check_last(call)
    return call


def _is_text(positions: Tensor) -> bool:
    """Whether positions [planes, batch, tokens] are the same in all planes, as those of text."""
    return bool((positions == positions[:1]).all())


def _check_last(call: Call) -> None:
    """generate() samples from the last column; a padded one there has no logits of its own."""
    begun, ended = call.real.any(1) | call.past.any(1), call.real[:, -1]
    keep = call.arguments.get("logits_to_keep")
    if bool((begun & ~ended).any()) and isinstance(keep, int) and keep > 0:
        raise InvalidInput(
            "apr.Cache: got padding on the right; generate() goes on from the last column: "
            "expected left "
            'padding, set tokenizer.padding_side = "left"'
        )


def follow(stored: Tensor, lengths: list[int]) -> Tensor:
    """The [batch, length] places that are no padding, when rows were trimmed to, or grew to,
    `lengths`.
    """
    if lengths == stored.sum(1).tolist():
        return stored
    rows = []
    for had, length in zip(stored, lengths, strict=True):
        end = int((had.cumsum(0) <= length).sum())
        row = had[:end] if length < int(had.sum()) else had
        # Padding behind the last token that is left tells nothing.
        row = row[: int(row.nonzero()[-1]) + 1] if bool(row.any()) else row[:0]
        more = torch.ones(length - int(row.sum()), dtype=torch.bool, device="cpu")
        rows.append(torch.cat([row, more]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def hide(threads: list[Thread], stored: Tensor, seen: Tensor) -> list[int]:
    """How many tokens each thread keeps where the mask now hides some of the `stored` places.

    Only what stands last can be let go; raises InvalidInput for a hole, and for a place shown that
    was padding.
    """
    kept = []
    for row, thread in enumerate(threads):
        had, shows = stored[row], seen[row]
        if bool((shows & ~had).any()):
            raise InvalidInput(
                f"apr.Cache: the mask shows places of row {row} that were padding when they were "
                "fed; nothing is stored of them: keep them hidden, or call reset() and feed the "
                "text again"
            )
        count = int((had & shows).sum())
        gone = had & ~shows
        if bool(gone.any()) and bool(shows[int(gone.int().argmax()) :].any()):
            raise InvalidInput(
                f"apr.Cache: the mask hides tokens of row {row} that are stored, with seen ones "
                "behind them; expected the past as it was, or its end hidden: call reset() and "
                "feed the text without them, or use an apr.Session, whose views leave out whole "
                "segments"
            )
        kept.append(count if bool(gone.any()) else len(thread))
    return kept


def common_columns(call: Call, threads: list[Thread]) -> tuple[int, list[int]]:
    """(columns of the call that every thread has stored, tokens that each thread keeps of them).

    What is read of the output is left to run.
    """
    columns = call.spare_columns
    for row, (thread, text) in enumerate(zip(threads, call.texts(), strict=True)):
        same = 0
        if thread.is_line and call.real_positions(row) == list(range(len(text))):
            for a, b in zip(thread.tokens, text, strict=False):
                if a != b:
                    break
                same += 1
        places = call.real[row].nonzero()[:, 0]
        columns = min(columns, int(places[same]) if same < len(text) else call.width)
    return columns, call.real[:, :columns].sum(1).tolist()
