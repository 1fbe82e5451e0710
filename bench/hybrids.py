"""Models with recurrent layers: N threads on one prompt against generate() with N sequences.
docs/performance.md has its figures.

python bench/hybrids.py OUT.json [SHAPE ...]      about 4 minutes a shape on two cores
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import apr
from apr.bench.harness import Machine

PROMPT, THREADS, TOKENS = 1024, 16, 12
_SMALL = dict(hidden_size=1024, vocab_size=65536, pad_token_id=0, bos_token_id=1, eos_token_id=None)
SHAPES: dict[str, tuple[Any, Any]] = {
    "gated delta rule (Qwen 3.5, 0.8B, fewer words)": (
        transformers.Qwen3_5ForCausalLM,
        transformers.Qwen3_5TextConfig(
            **_SMALL,
            intermediate_size=3584,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
        ),
    ),
    "short convolutions (LFM2, 350M)": (
        transformers.Lfm2ForCausalLM,
        transformers.Lfm2Config(
            **_SMALL,
            intermediate_size=6656,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=8,
            full_attn_idxs=[2, 5, 8, 10, 12, 14],
        ),
    ),
}


def ours(model: Any, ids: list[int]) -> dict[str, Any]:
    """Seconds of the prompt, milliseconds of a step, bytes of a state and what a fork takes."""
    with apr.Session(model, max_tokens=1 << 15) as session:
        root = session.thread(ids)
        began = time.perf_counter()
        session.step([root])
        prefill = time.perf_counter() - began
        alone = session.stats.state_bytes
        kids = root.fork(THREADS)
        forked = session.stats.state_bytes - alone
        times = []
        for token in range(5, 5 + TOKENS):
            for kid in kids:
                kid.extend([token])
            began = time.perf_counter()
            session.step(kids)
            times.append(1e3 * (time.perf_counter() - began))
    return {
        "prefill_s": round(prefill, 2),
        "step_ms": round(statistics.median(times[2:]), 1),
        "steps_ms": [round(x, 1) for x in times],
        "state_bytes": alone,
        "state_bytes_of_16_forks_before_they_run": forked,
    }


def stock(model: Any, ids: list[int]) -> dict[str, Any]:
    """The same of generate(), from runs of one token and of more."""
    batch = torch.tensor([ids])
    seconds = []
    for tokens in (1, 1 + TOKENS):
        began = time.perf_counter()
        model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            num_return_sequences=THREADS,
        )
        seconds.append(time.perf_counter() - began)
    step = 1e3 * (seconds[1] - seconds[0]) / TOKENS
    return {"prefill_s": round(seconds[0], 2), "step_ms": round(step, 1)}


def main(out: str, *names: str) -> None:
    """Measure, print, write."""
    transformers.logging.set_verbosity_error()
    found = {}
    for name, (kind, config) in SHAPES.items():
        if names and not any(part in name for part in names):
            continue
        torch.manual_seed(0)
        model = kind(config).to(torch.bfloat16).eval()
        ids = torch.randint(3, 60000, (PROMPT,)).tolist()
        found[name] = {"apr": ours(model, ids), "generate": stock(model, ids)}
        print(name, json.dumps(found[name]), flush=True)
    record = {"machine": asdict(Machine()), "prompt": PROMPT, "threads": THREADS}
    Path(out).write_text(json.dumps(record | {"models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
