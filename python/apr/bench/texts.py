"""Models from folders, and English text for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def loaded(folder: str, dtype: torch.dtype) -> Any:
    """A model from a folder, in one dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def pages_of(folder: str, tokens: int, then: int) -> list[list[int]]:
    """Nine pages of the Python reference or a few less, each of `tokens + then` tokens."""
    from pydoc_data.topics import topics  # English text that every Python has

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = tokenizer("\n\n".join(topics[name] for name in sorted(topics))).input_ids
    size = tokens + then
    return [text[i : i + size] for i in range(0, len(text) - size, len(text) // 9)]
