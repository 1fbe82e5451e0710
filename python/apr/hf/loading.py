"""A model and its tokenizer, from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apr.errors import InvalidInput


def load(path: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or hub id.

    Raises InvalidInput where it cannot be loaded, or brings code of its own: that is never run, nor
    asked about. Load such a model yourself, and give it to `apr.Session`.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        return model.eval(), AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"model {path!r} cannot be loaded: {error}") from error
