"""Multi-head latent attention: the latent is kept in place of the keys and values of all heads."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
)

import apr
from apr import _core
from apr.hf.latent import Linears
from apr.hf.model_state import _KNOWN
from kernel_cases import emulate
from models import CLOSE, FAR, VOCAB, distance, random_weights, stock, tokens

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=24,
    v_head_dim=20,
    vocab_size=VOCAB,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(
    n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32
)
KEPT = 32 + 16  # numbers of a token in a layer


def _build(name):
    config, kind = {
        "deepseek_v2": (DeepseekV2Config(**SHAPE, **EXPERTS), DeepseekV2ForCausalLM),
        "deepseek_v3": (DeepseekV3Config(**SHAPE, **EXPERTS), DeepseekV3ForCausalLM),
        "minicpm3": (MiniCPM3Config(**SHAPE), MiniCPM3ForCausalLM),
    }[name]
    torch.manual_seed(0)
    return random_weights(kind(config))


@pytest.fixture(scope="module")
def deepseek():
    return _build("deepseek_v3")


def expanded(monkeypatch, model):
    """The same model with keys and values of each head, as a model without latents has them."""
    monkeypatch.setattr(Linears, "find", lambda *_: None)
    _KNOWN.clear()
    return copy.deepcopy(model)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_latents_take_their_own_room_and_answer_as_stock(name):
    model = _build(name)
    with apr.Session(model, max_tokens=1024) as s:
        assert all(layer.latent is not None for layer in s.spec.layers)
        assert s.spec.bytes_per_token == 2 * KEPT * 4
        assert all(pool.v is pool.k for pool in s.pools)
        root = s.thread(tokens(40))
        kids = root.fork(3)
        for i, kid in enumerate(kids):
            kid.extend(tokens(5, seed=i + 1))
        for kid, row in zip(kids, s.step(kids), strict=True):
            assert distance(row, stock(model, kid.tokens)[-1]) < CLOSE
        kids[0].trim(30)
        root.join(kids[1:], reencode=True)
        for thread in (kids[0], root):
            assert distance(s.step([thread])[0], stock(model, thread.tokens)[-1]) < CLOSE
        s.check()
    assert not any(x._forward_pre_hooks or x._forward_hooks for x in model.modules())


def everything(model):
    """Logits of joins whose keys are turned, of regions read live, and behind a drop."""
    found = []
    with apr.Session(model, max_tokens=1024) as s:
        root = s.thread(tokens(40))
        for positions in ("max", "sum", "keep"):
            kids = root.fork(3)
            for i, kid in enumerate(kids):
                kid.extend(tokens(4, seed=i + 1))
            found.append(s.step(kids))
            root.join(kids, positions=positions)
            root.extend([9])
            found.append(s.step([root]))
        root.drop(3, 30)
        root.extend([8])
        found.append(s.step([root]))
        prompt, regions = s.segment(tokens(20)), [s.region(base=20), s.region(base=20)]
        writers = [
            s.thread([5 + i], view=[prompt, regions[1 - i], regions[i]], writes=regions[i])
            for i in (0, 1)
        ]
        for turn in range(3):
            found.append(s.step(writers))
            for writer in writers:
                writer.extend([40 + turn])
        return torch.cat(found), s.spec


def test_they_are_read_as_the_keys_of_all_heads_would_be(deepseek, monkeypatch):
    got, spec = everything(deepseek)
    want, other = everything(expanded(monkeypatch, deepseek))
    assert spec.layers[0].kv_heads == 1 and other.layers[0].kv_heads == 4
    assert distance(got, want) < CLOSE
    assert distance(got[0], got[1]) > FAR


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}])
def test_generate_with_our_cache(deepseek, options):
    ids = torch.tensor([tokens(20), [0] * 6 + tokens(14, seed=2)])
    mask = (ids != 0).long()
    options = {**options, "max_new_tokens": 8, "attention_mask": mask}
    options["do_sample"] = "num_beams" not in options
    torch.manual_seed(3)
    want = deepseek.generate(ids, **options)
    cache = apr.Cache(deepseek, max_tokens=4096)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the argument's name of before
        got = deepseek.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, want)
    cache.close()


def test_half_precision_and_other_weights_of_the_same_model(deepseek):
    half = copy.deepcopy(deepseek).to(torch.bfloat16)
    with apr.Session(half, max_tokens=512) as s:
        got = s.step([s.thread(tokens(50))])[0]
    want = stock(half, tokens(50))[-1]
    # The query is rounded once more, to 8 bits, before the product with the latent.
    assert distance(got, want) < 0.15 * float(want.std())


def test_a_compiled_model(deepseek):
    compiled = torch.compile(copy.deepcopy(deepseek), backend="eager", fullgraph=False)
    with apr.Session(compiled, max_tokens=512) as s:
        assert s.spec.layers[0].latent is not None
        thread = s.thread(tokens(30))
        for turn in range(3):
            got = s.step([thread])[0]
            assert distance(got, stock(deepseek, thread.tokens)[-1]) < CLOSE
            thread.extend([7 + turn])


def test_an_adapter_on_the_matrix_keeps_heads_apart(deepseek):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["kv_b_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(deepseek), config).eval()
    with apr.Session(model, max_tokens=512) as s:
        assert s.spec.layers[0].latent is None and s.spec.layers[0].kv_heads == 4
        assert distance(s.step([s.thread(tokens(30))])[0], stock(model, tokens(30))[-1]) < CLOSE


def _adapter(model, linear):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["kv_b_proj"], r=4, init_lora_weights=False)
    ).eval()


def _bias(model, linear):
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 2.0))


def _forward(model, linear):
    was = linear.forward
    linear.forward = lambda x: 1.5 * was(x)


CHANGES = {
    "adapter": _adapter,
    "bias": _bias,
    "forward": _forward,
    "hook": lambda _, linear: linear.register_forward_hook(lambda m, x, out: 1.5 * out),
    "pre-hook": lambda _, linear: linear.register_forward_pre_hook(lambda m, x: (1.5 * x[0],)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_matrix_that_is_changed_later_is_seen(deepseek, change):
    model = copy.deepcopy(deepseek)
    with apr.Session(model, max_tokens=512) as s:
        thread = s.thread(tokens(20))
        s.step([thread])
        CHANGES[change](model, model.model.layers[1].self_attn.kv_b_proj)
        thread.extend([5])
        with pytest.raises((apr.UnsupportedModel, apr.InvalidInput), match="refresh"):
            s.step([thread])
        s.refresh()
        assert (s.spec.layers[0].latent is None) == (change == "adapter")  # which wraps them all
        assert s.spec.layers[1].latent is None
        got = s.step([s.thread(tokens(30))])[0]
        want = stock(model, tokens(30))[-1]
        assert distance(got, want) < CLOSE < FAR < distance(want, stock(deepseek, tokens(30))[-1])


def test_calls_of_others_while_it_is_measured(deepseek):
    model, over = copy.deepcopy(deepseek), threading.Event()

    def call():
        while not over.is_set():
            stock(model, tokens(8))

    other = threading.Thread(target=call)
    other.start()
    try:
        for _ in range(5):
            _KNOWN.clear()
            with apr.Session(model, max_tokens=512, self_test=False) as s:
                assert s.spec.layers[0].latent is not None
    finally:
        over.set()
        other.join()


def test_saved_once_and_opened(deepseek, tmp_path):
    with apr.Session(deepseek, max_tokens=512) as s:
        thread = s.thread(tokens(30))
        s.step([thread])
        s.save(tmp_path / "one", {"thread": thread})
        thread.extend([5])
        want = s.step([thread])[0]
    opened, named = apr.Session.open(tmp_path / "one", deepseek, max_tokens=512)
    with opened as s:
        named["thread"].extend([5])
        assert distance(s.step([named["thread"]])[0], want) == 0


def test_vectors_of_heads_are_refused(deepseek):
    vectors = apr.hf.vectors.PathVectors(torch.zeros(2, 1, KEPT), torch.zeros(2, 1, KEPT))
    with apr.Session(deepseek, max_tokens=512) as s:
        thread = s.thread(tokens(5))
        with pytest.raises(apr.UnsupportedModel, match="latents"):
            thread.vectors = vectors
        assert s.step([thread]) is not None


@pytest.mark.skipif(_core.gpu(True) is None, reason="built without the emulated GPU")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_emulated_gpu(deepseek, architecture, dtype):
    model, found = copy.deepcopy(deepseek).to(dtype), []
    for emulated in (False, True):
        if emulated:
            emulate(architecture)
        try:
            with apr.Session(
                model, 1024, self_test=False, cuda_graphs=True if emulated else None
            ) as s:
                kids = s.thread(tokens(30)).fork(3)
                found.append([])
                for turn in range(4):
                    found[-1].append(s.step(kids))
                    for kid in kids:
                        kid.extend([5 + turn])
        finally:
            _core.force_instruction_set("")
    cpu, gpu = (torch.cat(x) for x in found)
    assert distance(cpu, gpu) < (CLOSE if dtype is torch.float32 else 0.15 * float(cpu.std()))
