"""What a thread wrote, as text: the one place where tokens become what users, extractors and
verifiers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
