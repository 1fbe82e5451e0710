"""What both trainers share: the model, the schedule, and a run's folder, from which it goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from apr.countdown.tokenizer import WORDS, build_tokenizer
from apr.errors import InvalidInput


class Shape(Protocol):
    """What a recipe says of the model and of its learning rate."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def seed(self) -> int: ...


def build_model(recipe: Shape) -> Any:
    """A Llama with tied embeddings over the Countdown vocabulary, freshly initialised from the
    seed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=WORDS.index("<bos>"),
        eos_token_id=WORDS.index("<eos>"),
        pad_token_id=WORDS.index("<pad>"),
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0.0, 0.05 if "embed" in name else p.shape[1] ** -0.5)
    return model


def schedule(
    optimizer: torch.optim.Optimizer,
    recipe: Shape,
    first: int,
    practice: int = 0,
    practice_rate: float = 1.0,
) -> LRScheduler:
    """Linear warm-up, a cosine to a hundredth, then `practice` steps from `practice_rate` to 0.

    It stands at step `first`, whatever recipe the steps before had.
    """
    rate = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate
    warmup = min(recipe.warmup, recipe.steps)
    decay = recipe.steps - warmup
    phases: list[tuple[int, LRScheduler]] = []
    if warmup:
        ramp = LinearLR(optimizer, 1 / recipe.warmup, total_iters=max(1, recipe.warmup - 1))
        phases.append((warmup, ramp))
    if decay:
        phases.append((decay, CosineAnnealingLR(optimizer, decay, eta_min=0.01 * rate)))
    if practice:
        phases.append((practice, LinearLR(optimizer, practice_rate, 0.0, total_iters=practice)))
    milestones = list(accumulate(length for length, _ in phases))
    if not phases:  # nothing to do
        return LinearLR(optimizer, 1.0)
    made = SequentialLR(optimizer, [part for _, part in phases], milestones[:-1])
    with warnings.catch_warnings():  # torch expects a step of the optimiser before each
        warnings.simplefilter("ignore")
        for _ in range(first):
            made.step()
    return made


class TrainingRun:
    """A run in a folder: its state, to go on from; its curve; at its end the checkpoint.

    Every part has `state_dict` and `load_state_dict`: the model, optimisers.
    """

    def __init__(self, out: Path, device: str, model: Any, parts: Sequence[Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._state, self._parts = out, out / "state.pt", [model, *parts]
        self._model = model
        self.first = 0  # step to go on from
        self.curve: list[dict[str, Any]] = []
        if self._state.exists():
            state = torch.load(self._state, weights_only=True, map_location=device)
            if "parts" not in state:
                raise InvalidInput(
                    f"{self._state}: got the state of an earlier version; expected one of this "
                    "version: remove it to start anew, or train into another folder"
                )
            for part, kept in zip(self._parts, state["parts"], strict=True):
                part.load_state_dict(kept)
            self.first, self.curve = state["step"], state["curve"]

    def note(self, record: dict[str, Any]) -> None:
        """Add a record of the curve, and write the state down: whole, or the former one stays."""
        self.curve.append(record)
        parts = [part.state_dict() for part in self._parts]
        new = self._state.with_suffix(".new")
        torch.save({"step": record["step"], "parts": parts, "curve": self.curve}, new)
        new.replace(self._state)

    def finish(self, task: str, recipe: Any) -> None:
        """Write the checkpoint in half precision, its tokenizer, and how it came to be."""
        self._model.float().cpu().half().save_pretrained(self._out)
        build_tokenizer().save_pretrained(self._out)
        command = f"python -m apr train {task}"
        record = {"command": command, **asdict(recipe), "curve": self.curve}
        (self._out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
