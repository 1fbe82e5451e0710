"""A model as remote code of 2025 spells it: the registry asked by name, its mask made by itself.

Its mask may hide what no probe sees, as a window does, so it runs by rows of its own cache.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama

import apr
import models
from models import CLOSE, FAR, distance, stock, tokens

# What this transformers calls a cache.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in BaseModelOutputWithPast.__dataclass_fields__
)


class OlderAttention(llama.LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs):
        lines = hidden_states.shape[:-1]
        heads = (*lines, -1, self.head_dim)
        q, k, v = (
            part(hidden_states).view(heads).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = llama.eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(out.reshape(*lines, -1)), None


class OlderModel(llama.LlamaModel):
    def forward(self, input_ids, position_ids=None, use_cache=False, **kwargs):
        hidden, cache = self.embed_tokens(input_ids), kwargs.get(CACHE)
        if use_cache and cache is None:
            cache = llama.DynamicCache(config=self.config)
        seen = cache.get_seq_length() if cache is not None else 0
        rows = torch.arange(seen, seen + hidden.shape[1])[:, None]
        columns = torch.arange(seen + hidden.shape[1])[None]
        shown = (columns <= rows) & (columns > rows - self.config.older_window)
        mask = torch.where(shown, 0.0, torch.finfo(hidden.dtype).min)[None, None]
        if position_ids is None:
            position_ids = rows[:, 0][None]
        turn = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            attended = layer.self_attn(layer.input_layernorm(hidden), turn, mask, cache)[0]
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache})


def older(window):
    torch.manual_seed(0)
    config = llama.LlamaConfig(**models.COMMON)
    config.older_window = window
    model = LlamaForCausalLM(config)
    model.model.__class__ = OlderModel
    for layer in model.model.layers:
        layer.self_attn.__class__ = OlderAttention
    return models.random_weights(model)


@pytest.mark.parametrize("window", [16, 4096])
def test_a_mask_of_its_own_making(window):
    """With a window that the self-test does not reach, too: what is not seen is not assumed."""
    model, prompt = older(window), tokens(60, 0)
    with pytest.warns(UserWarning, match="makes its attention mask"):
        session = apr.Session(model, max_tokens=1024)
    with session as s:
        kids = s.thread(prompt).fork(2)
        for turn in range(3):
            for i, kid in enumerate(kids):
                kid.extend(tokens(2 + i, turn))
            for kid, logits in zip(kids, s.step(kids), strict=True):
                assert distance(logits, stock(model, kid.tokens)[-1]) < CLOSE
        assert s.spec.by_rows
        # Power: of the two windows one matters.
        everything = stock(older(4096), kids[1].tokens)[-1]
        assert (distance(everything, logits) > FAR) == (window == 16)
    with pytest.raises(apr.UnsupportedModel, match=r"apr\.Session"):
        apr.Cache(model, max_tokens=256)
