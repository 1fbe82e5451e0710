"""Tiny random models of the families that the package promises, and the stock forward as an
oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BloomConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 128


@dataclass(frozen=True)
class Family:
    """What the tests know of a family by its documentation, so that apr must find it by
    measuring.
    """

    config: Any
    theta: float | None  # RoPE base, None: learned positions
    interleaved: bool = False
    window: int | None = None


COMMON: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=2048,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig(**COMMON), 10000.0),
    "qwen2": Family(Qwen2Config(**COMMON), 10000.0),
    "qwen3": Family(Qwen3Config(**COMMON, head_dim=24), 10000.0),
    "mistral": Family(MistralConfig(**COMMON, sliding_window=7), 10000.0, window=7),
    "phi3": Family(Phi3Config(**COMMON), 10000.0),
    "cohere": Family(CohereConfig(**COMMON), 500000.0, interleaved=True),
    "mixtral": Family(
        MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2), 1000000.0
    ),
    "gpt2": Family(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=VOCAB), None
    ),
    "opt": Family(
        OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=512,
            word_embed_proj_dim=64,
        ),
        None,
    ),
}
# Others that `apr.Cache` is tried with: several kinds of layers, softcap, and eager attention of
# their own.
MORE: dict[str, Any] = {
    "gemma2": Gemma2Config(**COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "llama4": Llama4TextConfig(**COMMON, head_dim=16, attention_chunk_size=8, num_local_experts=2),
}
CACHED = ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "mixtral", "opt"]
# Models that keep more than keys and values: gated delta rules, convolutions, a state space beside
# attention in each layer, one behind which several tokens at once go wrong, one without attention;
# attention code of their own, and positions that are counted and not given.
STATES: dict[str, Any] = {
    "qwen3_next": Qwen3NextConfig(
        **COMMON,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": Lfm2Config(**COMMON, layer_types=["conv", "full_attention"]),
    "falcon_h1": FalconH1Config(
        **COMMON,
        head_dim=16,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "jamba": JambaConfig(
        **COMMON,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "minimax": MiniMaxConfig(
        **COMMON,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
    ),
    "mamba": MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, vocab_size=VOCAB),
    "bloom": BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB),
    "bart": BartConfig(
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        max_position_embeddings=512,
        vocab_size=VOCAB,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
}
ROTARY = [name for name, family in FAMILIES.items() if family.theta is not None]
LEARNED = [name for name, family in FAMILIES.items() if family.theta is None]


def random_weights(model: Any, seed: int = 1) -> Any:
    """Weights large enough that attention matters: a wrong key moves the logits by far more than
    1e-3.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            scale = 0.3 if "emb" in name or "wte" in name else 0.9 * p.shape[-1] ** -0.5
            p.data = torch.randn(p.shape, generator=generator) * scale
    return model.eval()


def build(name: str, seed: int = 1, **settings: Any) -> Any:
    import copy

    known = {**{n: family.config for n, family in FAMILIES.items()}, **MORE, **STATES}
    config = copy.deepcopy(known[name])
    for setting, value in settings.items():
        setattr(config, setting, value)
    torch.manual_seed(seed)
    model = random_weights(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config), seed)
    if (
        name in MORE
    ):  # the SDPA attention of transformers 5.17 leaves the softcap out and says nothing
        model.set_attn_implementation("eager")
    return model


def tokens(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (n,), generator=generator).tolist()


@torch.no_grad()
def stock(model: Any, ids: list[int], **options: Any) -> Tensor:
    """Float logits [len(ids), vocab] of the stock forward on one sequence."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False, **options).logits[0]
    return logits.float()


# float32 logits of order 1 over two layers: the largest difference seen between stock kernels (SDPA
# against eager) on these models is 6e-6; ten times that is far below what one wrong key does (>
# 1e-2).
CLOSE = 6e-5
FAR = 1e-2


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def edit_lines(kind: str, thread: Any, threads: list[Any], rng: Any, turn: int) -> None:
    """One edit that keeps threads lines: "fork", "trim", "join" or "release"; others do nothing."""
    if kind == "fork" and len(threads) < 6:
        threads += thread.fork(rng.randint(1, 2))
    elif kind == "trim" and len(thread) > 2:
        thread.trim(rng.randint(max(1, len(thread) - 8), len(thread)))
    elif kind == "join":
        kids = thread.fork(2)
        for kid in kids:
            kid.extend(tokens(2, turn))
        thread.join(kids, reencode=True)
    elif kind == "release" and len(threads) > 1:
        threads.remove(thread)
        thread.release()
