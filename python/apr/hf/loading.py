"""A model and its tokenizer, from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from apr.errors import InvalidInput
from apr.ops import device as gpu


def load(
    path: str, dtype: torch.dtype | str = "auto", ranks: int = 1, device: str | None = None
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or hub id; with `ranks`, this process's part of a
    model that so many hold (transformers' tensor parallelism, under torchrun). Where its KV heads
    cannot be shared out evenly, each rank has all of the attention, and a part of the rest.

    device: "cuda", "cuda:1", "cpu"; "auto" lays its layers out over all GPUs (accelerate); None:
    the CPU, or with `ranks` that of the rank.

    Raises InvalidInput where it cannot be loaded, or brings code of its own: that is never run, nor
    asked about. Load such a model yourself, and give it to `apr.Session`.
    """
    if device is not None:
        _check_device(device, ranks)
    try:
        parts = _shared_out(path, ranks) if ranks > 1 else {}
        if device == "auto":
            parts["device_map"] = "auto"
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, **parts
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InvalidInput(f"model {path!r} cannot be loaded: {error}") from error
    if device not in (None, "auto"):
        try:
            model = model.to(device)
        except (RuntimeError, ValueError, AssertionError) as error:  # of room, of weights in bits
            raise InvalidInput(f"device: got {device!r}: {str(error).splitlines()[0]}") from error
    return model.eval(), tokenizer


def _check_device(device: str, ranks: int) -> None:
    """Raise InvalidInput for a device that is not there, before anything is read."""
    if ranks > 1:
        raise InvalidInput(f"device: got {device!r} for {ranks} ranks, which have one each")
    if device == "auto":
        return
    try:
        torch.empty(1, dtype=torch.uint8, device=device)
        gpu.backend(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"device: got {device!r}: {str(error).splitlines()[0]}") from error


def _shared_out(path: str, ranks: int) -> dict[str, Any]:
    """Arguments that load one of so many parts of a model."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    if plan and heads % ranks:
        text.base_model_tp_plan = {k: how for k, how in plan.items() if "attn" not in k}
    return {"config": config, "distributed_config": DistributedConfig(tp_size=ranks)}
