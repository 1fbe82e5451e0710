"""What a thread wrote, as text: the one place where tokens become what users, extractors and
verifiers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def written_text(
    tokenizer: Any, tokens: Sequence[int], finish: str = "", skip_special_tokens: bool = False
) -> str:
    """The text of `tokens` as the model wrote it: no blank is stripped, and special tokens stand in
    it.

    The end token that a thread `finish`ed with ("eos") is no text. skip_special_tokens: leave all
    of them out. "" without a tokenizer.
    """
    if tokenizer is None:
        return ""
    ids = list(tokens[:-1]) if finish == "eos" else list(tokens)
    text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return text


def continued(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that continues other text: without special tokens, and without the blank
    that some tokenizers begin with.
    """
    if not text:
        return []

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    before, both = ids_of("."), ids_of("." + text)
    behind = both[len(before) :]
    if both[: len(before)] == before:
        spelled = tokenizer.decode(
            behind, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if spelled.strip() == text.strip():
            return behind
    return ids_of(text)


class GrowingText:
    """The same text while it is being written: each token costs what it adds, not all before it."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._stream: DecodeStream | None = None
        if isinstance(self._fast, Tokenizer):
            self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []  # where the tokenizer is none of tokenizers'
        self.text = ""

    def add(self, token: int) -> None:
        """Take one more token; a character of several tokens appears with its last one."""
        if self._stream is None:
            self._tokens.append(token)
            self.text = written_text(self._tokenizer, self._tokens, "", self._skips)
        else:
            try:
                self.text += self._stream.step(self._fast, token) or ""
            except Exception:  # tokenizers gives up where bytes make no text; it can begin anew
                self._stream = DecodeStream(skip_special_tokens=self._skips)
                self.text += self._stream.step(self._fast, token) or ""
