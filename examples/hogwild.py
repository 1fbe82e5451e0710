"""Hogwild! Inference (arXiv 2504.06261) on a text model: Alice and Bob share their steps as they
write them.

    python examples/hogwild.py PATH_OR_HUB_ID "question" [WORKERS]

Without a model it runs on a small random one of Qwen2 type, to show the views and the step rule at
work.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import apr
from apr import hf
from apr.strategies import Team

RULES = """
Several of you solve this together. Each writes short steps; a step ends with an empty line. You
see the steps that everybody has finished, and what the others are writing right now. Do not
repeat each other: split the work, use what the others found, and say so if they are wrong. Give
the answer as \\boxed{...}.
"""


def random_model() -> tuple[Any, Any]:
    """A tiny Qwen2 with random weights, and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(alphabet),
    )
    return Qwen2ForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=inner)


def main(path: str | None, question: str, workers: int) -> None:
    model, tokenizer = hf.load(path) if path else random_model()
    prompt: Any = question + "\n" + RULES
    if getattr(tokenizer, "chat_template", None):
        prompt = [{"role": "user", "content": prompt}]
    seen: list[Team] = []
    shared = [0]

    def each_step(number: int, teams: list[Team]) -> None:
        seen[:] = teams
        shared[0] = len(teams[0].history)

    result = apr.hogwild(
        model,
        tokenizer,
        prompt,
        workers=workers,
        max_new_tokens=1024 if path else 48,
        temperature=0.6 if path else 1.0,
        # A random model hardly ever ends a step by itself.
        sequence_bias=None if path else {tuple(tokenizer("\n\n").input_ids[:1]): 4.0},
        eos_token_id=None if path else [],
        done=lambda text: "\\boxed{" in text,
        each_step=each_step,
        answer_prompt="\n\nFinal answer: \\boxed{",
        answer_tokens=16,
    )
    for worker in seen[0].everyone:
        steps = worker.number
        print(
            f"{worker.name}: {len(worker.written.tokens)} tokens, {steps} steps, "
            f"{worker.written.finish}"
        )
    print(f"steps in the common history: {shared[0]}")
    print(f"answer: {result.text!r}")
    print(f"{result.total_tokens} tokens, {result.critical_path_tokens} one after the other")


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else None,
        sys.argv[2] if len(sys.argv) > 2 else "What is 17 * 23?",
        int(sys.argv[3]) if len(sys.argv) > 3 else 2,
    )
