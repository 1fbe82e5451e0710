"""A tiny random model of every architecture that AutoModelForCausalLM knows: two layers, or one of
each kind.

A configuration's fields are shrunk by their names; what the names do not tell stands in SPECIAL.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 128
WINDOW = 16

_BY_SIZE: dict[int, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size "
    "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "d_ff d_inner dff dim_ff feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "mamba_d_ssm",
    64: "hidden_size n_embd d_model dim emb_dim embedding_dim embedding_size word_embed_proj_dim "
    "lru_width attention_hidden_size input_embedding_size output_embedding_size embed_dim "
    "backbone_hidden_size cross_hidden_size nemo_final_size ext_pw_out_channel "
    "depthwise_separable_out_channel nemo_conv_channels pronunciation_embed_dim shape_embed_dim "
    "ple_embed_dim projector_hidden_size",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "attention_heads swa_num_attention_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts mamba_dt_rank time_step_rank linear_num_value_heads linear_num_heads",
    512: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions "
    "context_length model_max_length max_source_positions",
    2: "num_experts_per_tok moe_k moe_top_k moe_topk num_experts_per_token top_k_experts "
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups index_n_heads "
    "linear_num_key_heads num_codebooks global_attn_every_n_layers o_groups",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size shared_experts_intermediate_size q_lora_rank "
    "lora_rank image_size",
    WINDOW: "sliding_window attention_chunk_size window_size attention_window_size "
    "sliding_window_size local_attention local_attention_window_len keep_window_size head_dim "
    "swa_head_dim attention_head_size d_kv kv_channels d_head dim_head kv_lora_rank "
    "qk_nope_head_dim v_head_dim index_topk index_head_dim mamba_d_head mamba_head_dim "
    "mamba_headdim linear_key_head_dim linear_value_head_dim linear_head_dim router_hidden_size "
    "lsh_attn_chunk_length local_attn_chunk_length o_lora_rank",
    1: "n_group topk_group num_expert_group num_shared_experts n_shared_experts "
    "moe_num_shared_experts mamba_n_groups mamba_ngroups n_groups first_k_dense_replace "
    "num_dense_layers moe_layer_start_index moe_layer_end_index max_window_layers",
    8: "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_state "
    "state_size ssm_state_size hidden_size_per_layer_input laurel_rank adapter_rank patch_size",
    24: "qk_head_dim",
    0: "num_nextn_predict_layers num_kv_shared_layers",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_LAYERS = [
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "attention_layers_count",
    "depth",
]
_KINDS = ("layer_types", "layers_block_type", "block_types")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_WIDER = {"per_layer_config": {1: {"head_dim": 32}}}
_LATENT = dict(
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, head_dim=24,
    qk_nope_head_dim=16, v_head_dim=16, qk_rope_head_dim=8,
)  # fmt: skip
_DOTS = {"per_layer_config": {1: _LATENT}, "num_key_value_heads": 4, "head_dim": 24}
_INDEXED = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16,
    indexer_compress_ratio=4, hc_lowrank=8, ngram_vocab_size_base=64, split_ngram_parts=2,
)  # fmt: skip
_TURNS = ["linear_attention", "hybrid"] * 2


def _below(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in fields.items()}


# A dotted name reaches into a configuration below; `...` takes a field out.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config.hidden_size_global": 64,
        "decoder_config.hidden_size_global": 64,
        "encoder_config.cross_attn_k": 2,
        "decoder_config.cross_attn_k": 2,
        "encoder_hash_byte_group_vocab": 256,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": _DOTS,
    "dots3_note": {
        **_below("text_config", _DOTS),
        **_below("vision_config", {"adapter_in_dim": 64, "adapter_out_dim": 64}),
        **_below("audio_config", {"adapter_input_size": 64, "adapter_out_dim": 64}),
    },
    "gemma4_text": _WIDER,
    "gemma4_unified_text": _WIDER,
    "gemma4": _below("text_config", _WIDER),
    "gemma4_unified": _below("text_config", _WIDER),
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mistral4": {"head_dim": 24},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": _below("text_config", _INDEXED),
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32], "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": _TURNS,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_query_groups": ...,
        "num_hidden_layers": 4,
        "layers_block_type": _TURNS,
        "hybrid_layer_ids": ...,
        "kv_channels": ...,
        "num_key_value_heads": 4,
        "mamba_headdim": ...,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def _shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that have another size here."""
    known = default.to_dict()

    def value_of(name: str) -> Any:
        try:
            return getattr(default, name, known.get(name))
        except Exception:  # a field that differs from layer to layer has no one value
            return known.get(name)

    def has(name: str) -> bool:
        of_class = getattr(type(default), name, None)
        return name in known or (name in vars(default) and not isinstance(of_class, property))

    fields: dict[str, Any] = {}
    for name, size in SIZES.items():
        value = value_of(name)
        set_here = value is not None or name == "head_dim"
        if has(name) and set_here and not isinstance(value, (list, dict)):
            fields[name] = size
    if {"qk_rope_head_dim", "head_dim"} <= fields.keys():
        fields["head_dim"] = fields["qk_rope_head_dim"]
    heads = next((fields[n] for n in ("num_attention_heads", "n_heads") if n in fields), 4)
    grouped = value_of("num_key_value_heads")
    if grouped is not None:
        fields["num_key_value_heads"] = (
            heads if grouped == value_of("num_attention_heads") else heads // 2
        )
    fields |= {name: i for name, i in _TOKENS.items() if known.get(name) is not None}
    if "n_inner" in known:
        fields["n_inner"] = 128
    if known.get("is_decoder") is False:
        fields["is_decoder"] = True
    return fields | _fewer_layers(known, value_of("num_hidden_layers") or value_of("n_layer"))


def _fewer_layers(known: dict[str, Any], layers: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    count = 2
    for name in _KINDS:
        kinds = known.get(name)
        if isinstance(kinds, (list, tuple)) and kinds:
            distinct = list(dict.fromkeys(kinds))
            count = max(2, len(distinct))
            fields[name] = (distinct * 2)[:count]
    for name, value in known.items():
        each = isinstance(value, (list, tuple)) and isinstance(layers, int)
        if name not in fields and each and len(value) == layers > 2:
            plain = all(isinstance(x, (str, int)) for x in value)
            distinct = list(dict.fromkeys(value)) if plain else []
            fields[name] = (distinct * count if len(distinct) > 1 else list(value))[:count]
    fields |= {n: count for n in _LAYERS if isinstance(known.get(n), int)}
    return fields


def _fields(default: PreTrainedConfig, special: dict[str, Any]) -> dict[str, Any]:
    fields = _shrunk(default)
    inner: dict[str, dict[str, Any]] = {}
    for name in [n for n in special if "." in n]:
        part, rest = name.split(".", 1)
        inner.setdefault(part, {})[rest] = special.pop(name)
    for name, kind in (getattr(type(default), "sub_configs", None) or {}).items():
        held = getattr(default, name, None)
        if isinstance(held, PreTrainedConfig) and name not in special:
            fields[name] = _fields(held, inner.get(name, {}))
            if kind is not type(held):
                fields[name]["model_type"] = held.model_type
    fields.update(special)
    return {name: value for name, value in fields.items() if value is not ...}


def randomize(model: Any, std: float = 0.15, seed: int = 1) -> Any:
    """Weights with which every token and layer shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if not p.is_floating_point() or "inv_freq" in name:
            continue
        weight = isinstance(p, torch.nn.Parameter) and (p.ndim > 1 or "sink" in name)
        # Buffers of torch.empty that nobody has filled.
        wild = not bool(p.isfinite().all()) or (p.numel() and float(p.abs().max()) > 1e3)
        if weight or wild:
            p.data = (torch.randn(p.shape, generator=generator) * std).to(p.dtype)
    return model.eval()


def adapted(model: Any) -> Any:
    """With low-rank adapters on every linear layer, of random weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval()


def offloaded(model: Any) -> Any:
    """With weights that rest elsewhere, as `device_map` leaves them."""
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def compiled(model: Any) -> Any:
    """As one graph, without the minutes that making code of it takes."""
    return torch.compile(model, backend="eager")


def int8(model: Any) -> Any:
    """With the weights of its linear layers in eight bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


# What users do to a model before they bring it, by the word behind the comma of a name.
VARIANTS = {"adapters": adapted, "offloaded": offloaded, "compiled": compiled, "int8": int8}
VARIED = [
    f"{name}, {way}" for name in ("llama", "gemma3_text", "lfm2", "bloom") for way in VARIANTS
] + ["deepseek_v3, int8"]


def build(name: str, std: float | None = 0.15, seed: int = 1) -> Any:
    """A model in float32; std None leaves transformers' own small initial weights."""
    name, _, way = name.partition(", ")
    model = _built(name, std, seed)
    return VARIANTS[way](model) if way else model


def _built(name: str, std: float | None, seed: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = CONFIG_MAPPING[name]
        config = kind(**_fields(kind(), copy.deepcopy(SPECIAL.get(name, {}))))
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval() if std is None else randomize(model, std, seed)
