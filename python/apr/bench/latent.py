"""Latent attention (MLA) beside stock transformers, which makes the keys and values of all heads
anew from all latents in each step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from apr.bench.harness import Figure
from apr.bench.loop import ours, shown, stock


def attention_of_v2_lite(smoke: bool) -> Any:
    """Four layers with the attention of DeepSeek-V2-Lite and dense feed-forward parts, random
    weights in bfloat16.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=64 if smoke else 2048,
        intermediate_size=128 if smoke else 4096,
        num_hidden_layers=4,
        first_k_dense_replace=4,  # no experts
        num_attention_heads=4 if smoke else 16,
        num_key_value_heads=4 if smoke else 16,
        q_lora_rank=None,
        kv_lora_rank=32 if smoke else 512,
        qk_rope_head_dim=16 if smoke else 64,
        qk_nope_head_dim=32 if smoke else 128,
        v_head_dim=32 if smoke else 128,
        vocab_size=512 if smoke else 32000,
        bos_token_id=None,
        eos_token_id=None,
    )
    return DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()


def bench_latent(options: argparse.Namespace) -> Iterator[Figure]:
    """Prefill and steps of 1, 4 and 16 threads on a prefix, with the memory that they take."""
    model = attention_of_v2_lite(options.smoke)
    steps = 5 if options.smoke else 16
    for threads in (1, 2) if options.smoke else (1, 4, 16):
        step = 0.0
        for figure in ours(model, threads, options.prefix, steps):
            step = figure.median
            yield shown(figure)
        other = stock(model, threads, options.prefix, max(6, steps // 3))
        if other is not None:
            other.note = f"{other.median / step:.2f} x apr"
            yield shown(other)
