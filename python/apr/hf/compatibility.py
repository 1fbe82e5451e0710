"""The versions of transformers that apr was run with, and what differs between them."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import transformers

OLDEST, NEWEST = "5.17", "5.24"  # `make test-versions` runs both ends

# How a forward names its cache: 5.24 renamed it inside the models, the last of them in Mambas.
CACHE_ARGUMENTS = ("past_key_values", "cache", "cache_params")


def describe() -> str:
    """What runs, and what was tested, for messages."""
    return (
        f"transformers {transformers.__version__} (tested: {OLDEST} to {NEWEST}), "
        f"torch {torch.__version__}"
    )


def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warn where a transformers newer than all that were tested is installed."""
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    newest = tuple(int(part) for part in NEWEST.split("."))
    if found > newest:
        warnings.warn(
            f"apr was tested with transformers {OLDEST} to {NEWEST}, and this is {version}: models "
            "are still measured and proved when they are attached, but what generate() expects of "
            f"a cache may have changed; if it fails, pip install 'transformers=={NEWEST}.*'",
            stacklevel=3,
        )


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward, under either name, or None."""
    return next((c for name in CACHE_ARGUMENTS if (c := arguments.get(name)) is not None), None)


def asked_by_whole_prefill() -> bool:
    """Whether the caller's caller is generate()'s prefill with a whole prompt, about to leave out
    of it what a cache holds. It gives the cache no other sign, and may hold new tokens alone, under
    a mask of everything.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name != "_prefill":
        return False
    names = frame.f_locals
    arguments = names.get("model_kwargs", {})
    text = arguments.get("inputs_embeds")
    if text is not None:
        return True  # embeddings are whole at all times
    mask = arguments.get("attention_mask")
    mask = names.get("attention_mask") if mask is None else mask  # taken out for chunks
    # Of a mask that hid nothing, and was left out.
    width = getattr(names.get("generation_config"), "_mask_length", -1)
    width = width if mask is None else mask.shape[1]
    ids = names.get("input_ids")
    return ids is not None and width == ids.shape[1]


def in_prefill() -> bool:
    """Whether generate()'s prefill is among the callers: one that failed before its forward is
    not.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_name != "_prefill":
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return True
