"""Trains the small Llama of the package on Countdown guesses; seeded, resumable, on CPU or GPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from apr.countdown.problems import Problem, Range, format_chain, sample_problems, solved, verify
from apr.countdown.tokenizer import WORDS, build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint; written beside it as `training.json`."""

    steps: int = 10000
    rows: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 100
    hidden_size: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 384
    positions: int = 512
    seed: int = 0
    numbers: int = 3
    highest: int = 16
    target: int = 100

    @property
    def span(self) -> Range:
        return Range(highest=self.highest, target=self.target)


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


SMOKE = Recipe(steps=20, rows=64, layers=2, highest=6, warmup=5)


def build_model(recipe: Shape) -> Any:
    """A Llama with tied embeddings over the Countdown vocabulary, freshly initialised from the seed."""
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


def training_rows(recipe: Recipe) -> tuple[Tensor, int]:
    """All solved training problems as token rows [rows, length], and the length of their prompts."""
    words = {word: i for i, word in enumerate(WORDS)}
    rows = []
    for problem, chain in solved(recipe.numbers, recipe.span, held_out=False):
        text = f"{problem.prompt} {format_chain(chain)} <eos>"
        rows.append([words[w] for w in text.split()])
    return torch.tensor(rows), len(problem.prompt.split())


def rate(recipe: Shape, step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, problems: list[Problem], samples: int, seed: int
) -> dict[str, float]:
    """Held-out accuracy: greedy, sampled once, and with a verifier over 4 and `samples` samples."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    length = 4 * (len(problems[0].numbers) - 1) + 1
    ids = torch.tensor([tokenizer(p.prompt).input_ids for p in problems], device=device)
    generator = torch.Generator(device).manual_seed(seed)

    def complete(rows: Tensor, greedy: bool) -> list[str]:
        start = rows.shape[1]
        for _ in range(length):
            last = model(rows).logits[:, -1].float()
            drawn = torch.multinomial(last.softmax(-1), 1, generator=generator)
            rows = torch.cat([rows, last.argmax(-1, keepdim=True) if greedy else drawn], 1)
        texts: list[str] = tokenizer.batch_decode(rows[:, start:])
        return [t.split("<eos>")[0] for t in texts]

    greedy = [verify(p, t) for p, t in zip(problems, complete(ids, True), strict=True)]
    sampled = complete(ids.repeat_interleave(samples, 0), False)
    hits = np.array([verify(problems[i // samples], t) for i, t in enumerate(sampled)])
    hits = hits.reshape(len(problems), samples)
    model.train(was_training)
    return {
        "greedy": float(np.mean(greedy)),
        "sampled_once": float(hits[:, 0].mean()),
        "within_4": float(hits[:, :4].any(1).mean()),
        f"within_{samples}": float(hits.any(1).mean()),
    }


def _save_state(path: Path, step: int, model: Any, optimizer: Any, curve: list[Any]) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "curve": curve,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train(
    recipe: Recipe, out: Path, device: str = "cpu", report_every: int = 500
) -> Iterator[dict[str, Any]]:
    """Train, yielding a progress record every `report_every` steps; continues from `out/state.pt`.

    Step k draws its rows from a generator keyed by (seed, k), so an interrupted run that resumes makes
    the same checkpoint as one that was never stopped (up to the reduction order of the machine).
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = build_tokenizer(), build_model(recipe).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    rows, prompt = training_rows(recipe)
    rows = rows.to(device)
    tests = sample_problems(200, seed=1, count=recipe.numbers, span=recipe.span)
    state_path, first, curve = out / "state.pt", 0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve = state["step"], state["curve"]
    began, total = time.perf_counter(), 0.0
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        pick = np.random.default_rng([recipe.seed, step]).integers(0, len(rows), recipe.rows)
        batch = rows[torch.from_numpy(pick).to(device)]
        logits = model(batch[:, :-1]).logits[:, prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, prompt:].flatten()
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % report_every == 0 or step + 1 == recipe.steps:
            record = {
                "step": step + 1,
                "loss": round(total / ((step % report_every) + 1), 4),
                "seconds": round(time.perf_counter() - began, 1),
                **evaluate(model, tokenizer, tests, 16, seed=2),
            }
            total = 0.0
            curve.append(record)
            _save_state(state_path, step + 1, model, optimizer, curve)
            yield record
    save(model.float().cpu(), tokenizer, recipe, curve, out)


def save(model: Any, tokenizer: Any, recipe: Recipe, curve: list[Any], out: Path) -> None:
    """Write the checkpoint in half precision, its tokenizer, and how it came to be."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {"command": "python -m apr train guess", **asdict(recipe), "curve": curve}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
