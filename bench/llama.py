"""llama.cpp on the weights of `python -m apr bench loop`: bench/peers.sh llama runs both halves.

python bench/llama.py export FILE.gguf SITE_PACKAGES_WITH_GGUF    (apr's environment)
python bench/llama.py measure FILE.gguf OUT.json                  (llama-cpp-python's)
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def export(path: Path, packages: str) -> None:
    """The random weights as a GGUF file in bfloat16, without a vocabulary."""
    sys.path.append(packages)
    import gguf
    import torch

    from apr.bench.loop import half_billion

    model = half_billion()
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.named_parameters():
        kind = name.rsplit(".", 1)[1]
        if name.startswith("model.layers."):
            _, _, layer, part = name.rsplit(".", 1)[0].split(".", 3)
            target = f"blk.{layer}.{NAMES[part]}.{kind}"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight"}.get(
                name, "output_norm.weight"
            )
        if tensor.ndim == 1:
            writer.add_tensor(target, tensor.detach().float().numpy())
        else:
            raw = tensor.detach().view(torch.int16).numpy().view("uint16")
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """A context of llama.cpp with one unified cache of `sequences` sequences."""

    def __init__(self, llama: Any, path: Path, tokens: int, sequences: int) -> None:
        self.llama = llama
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            str(path).encode(), llama.llama_model_default_params()
        )
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, 2048, 512
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        self.context = llama.llama_init_from_model(self.model, params)

    def run(self, tokens: list[tuple[int, int, int]], last_only: bool) -> None:
        """(token, position, sequence) of each row; logits of all rows or of the last."""
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = int(not last_only or i == len(tokens) - 1)
        if self.llama.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        assert ctypes.cast(logits, ctypes.c_void_p).value  # waits for what is computed
        self.llama.llama_batch_free(batch)

    def close(self) -> None:
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


def measure(path: Path, out: Path) -> None:
    """Prefill, and decode steps of sequences that share it by seq_cp, without sampling."""
    import llama_cpp as llama

    rows = []
    for prefix in (512, 2048, 8192):
        for count in (1, 4, 16, 64):
            context = Context(llama, path, prefix + 64 * count + 256, count)
            began = time.perf_counter()
            for first in range(0, prefix, 2048):
                part = range(first, min(first + 2048, prefix))
                context.run([(7919 * i % 150_000, i, 0) for i in part], True)
            prefill = time.perf_counter() - began
            memory = llama.llama_get_memory(context.context)
            for sequence in range(1, count):
                llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
            times = []
            for step in range(10):
                began = time.perf_counter()
                context.run([(step + s, prefix + step, s) for s in range(count)], False)
                times.append(1e3 * (time.perf_counter() - began))
            context.close()
            rows.append(
                {
                    "name": f"llama.cpp, step, {count} x {prefix}",
                    "median_ms": round(statistics.median(times[1:]), 2),
                    "min_ms": round(min(times[1:]), 2),
                    "max_ms": round(max(times[1:]), 2),
                    "prefill_s": round(prefill, 2),
                }
            )
            print(rows[-1], flush=True)
            out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    if what == "export":
        export(Path(paths[0]), paths[1])
    else:
        measure(Path(paths[0]), Path(paths[1]))
