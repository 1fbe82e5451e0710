"""A session or a cache beside the user's own use of the model: their calls are stock, what changes
is noticed.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
)

import apr
from apr.hf import interface
from models import CLOSE, COMMON, FAR, VOCAB, build, distance, random_weights, stock, tokens
from threads_program import in_threads

PROMPT = tokens(11)
IDS = torch.tensor([PROMPT])
GREEDY = dict(do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=None)


def gpt_oss():
    """Attention with sinks and windows, which only its own eager attention computes."""
    config = GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    )
    return random_weights(GptOssForCausalLM(config))


def generated(model, cache=None, ids=IDS, **options):
    return model.generate(ids, past_key_values=cache, **{**GREEDY, **options})


# ---- the user's own calls ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt_oss, lambda: build("gemma2"), lambda: build("llama")])
def test_own_calls_are_stock_while_a_session_and_a_cache_are_open(make):
    model = make().requires_grad_(False)
    model.set_attn_implementation("eager")
    before = model(IDS, use_cache=False, output_attentions=True)
    text = generated(model)
    with apr.Session(model, max_tokens=1024) as s:
        cache = apr.Cache(model, max_tokens=1024)
        s.step([s.thread(PROMPT)])
        after = model(IDS, use_cache=False, output_attentions=True)
        assert torch.equal(after.logits, before.logits)
        assert all(map(torch.equal, after.attentions, before.attentions))
        assert torch.equal(generated(model), text)
        assert torch.equal(generated(model, cache), text)
        assert model.config._attn_implementation == "eager"
        assert distance(s.step([s.thread(PROMPT)])[0], before.logits[0, -1]) < CLOSE
        cache.close()


def test_own_training_step_while_a_session_is_open(llama):
    def gradients(model):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model = build("llama")
    want = gradients(build("llama"))
    with apr.Session(model, max_tokens=512):
        cache = apr.Cache(model, max_tokens=512)
        assert all(map(torch.equal, gradients(model), want))
        logits = model(IDS, past_key_values=cache).logits
        with pytest.raises(apr.InvalidInput, match="no gradient"):
            logits.sum().backward()
        cache.close()


def test_own_ways_of_generating_while_a_cache_is_open():
    model = build("llama")
    config = GenerationConfig(**GREEDY)
    # Left to itself it takes nine tenths of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    def every_way():
        batch = model.generate_batch([PROMPT], config, continuous_batching_config=small)
        return [
            generated(model, guidance_scale=1.5),
            generated(model, cache_implementation="static", disable_compile=True),
            torch.tensor([x.generated_tokens for x in batch.values()]),
        ]

    want = every_way()
    cache = apr.Cache(model, max_tokens=512)
    assert all(map(torch.equal, every_way(), want))
    cache.close()


def test_copies_and_pickles_of_a_model_in_use(tmp_path):
    model = build("llama")
    cache = apr.Cache(model, max_tokens=512)
    generated(model, cache)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    model.save_pretrained(tmp_path)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert other.config._attn_implementation == model.config._attn_implementation == "sdpa"
        assert torch.equal(generated(other), generated(model))
        with pytest.raises(apr.UnsupportedModel, match=r"no hook of it ran.*transformers \d"):
            generated(other, cache)
        with apr.Session(other, max_tokens=256) as s:
            assert distance(s.step([s.thread(PROMPT)])[0], stock(model, PROMPT)[-1]) < CLOSE
    assert "apr" not in (tmp_path / "config.json").read_text()
    assert torch.equal(generated(model, cache), generated(model))
    cache.close()


def test_the_model_is_freed_after_its_sessions():
    model = build("llama")
    apr.Session(model, max_tokens=256).close()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_implementations_of_the_parts_come_back_as_they_were(llama):
    class Part(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    model = build("llama")
    other = copy.deepcopy(model.config)
    other._attn_implementation = "eager"
    model.extra = Part(other)
    with apr.Session(model, max_tokens=256) as s:
        s.step([s.thread(PROMPT)])
    assert (model.config._attn_implementation, other._attn_implementation) == ("sdpa", "eager")


# ---- Python threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_python_threads_share_a_model(name):
    model = build(name)
    own = model.config._attn_implementation
    prompts = [torch.tensor([tokens(6 + i, i)]) for i in range(4)]
    want = [generated(model, ids=p) for p in prompts]

    def work(i):
        for _ in range(3):
            if i == 0:  # a stock call beside ours
                assert torch.equal(generated(model, ids=prompts[i]), want[i])
            elif i == 1:
                with apr.Session(model, max_tokens=512) as s:
                    out = apr.decode(s, [s.thread(prompts[i][0])], **GREEDY)[0].tokens
                assert out == want[i][0, prompts[i].shape[1] :].tolist()
            else:
                cache = apr.Cache(model, max_tokens=512)
                assert torch.equal(generated(model, cache, prompts[i]), want[i])
                cache.close()

    in_threads(4, work)
    assert model.config._attn_implementation == own and not interface._SWITCHED


def test_one_session_or_cache_in_two_python_threads_is_refused_by_name():
    model = build("llama")
    want = generated(model)
    cache, s = apr.Cache(model, max_tokens=512), apr.Session(model, max_tokens=512)
    thread, said = s.thread(PROMPT), []

    def meanwhile(*_):
        def call(i):
            with pytest.raises(apr.InvalidInput) as raised:
                s.step([thread]) if s.table.turn.taken else model(IDS, past_key_values=cache)
            said.append(str(raised.value))

        in_threads(1, call)

    hook = model.model.layers[0].register_forward_hook(meanwhile)
    s.step([thread])
    assert torch.equal(generated(model, cache), want)
    hook.remove()
    assert "step is running" in said[0] and "another Python thread" in said[1]
    assert len(said) == 1 + GREEDY["max_new_tokens"]
    cache.close()
    s.close()


def test_a_model_called_in_a_hook_of_another():
    llama, inner = build("llama"), build("qwen2")
    with apr.Session(llama, max_tokens=512) as s, apr.Session(inner, max_tokens=512) as other:
        held = other.thread([5, 6])

        def step_the_other(*_):
            held.extend([7])
            other.step([held])

        hook = llama.model.layers[0].register_forward_hook(step_the_other)
        got = s.step([s.thread(PROMPT)])[0]
        hook.remove()
    assert distance(got, stock(llama, PROMPT)[-1]) < CLOSE


# ---- models as people hold them ----------------------------------------------------------------


def test_wrapped_models_are_unwrapped_and_others_refused():
    model = build("llama")
    want = generated(model)
    cache = apr.Cache(torch.nn.DataParallel(model), max_tokens=512)
    assert torch.equal(generated(model, cache), want)
    cache.close()
    config = model.config
    for kind, says in (
        (AutoModel, "a head is missing"),
        (AutoModelForSequenceClassification, "classifier"),
        (AutoModelForTokenClassification, "classifier"),
    ):
        other = kind.from_config(config).eval()
        with pytest.raises(
            apr.UnsupportedModel, match=f"{says}.*AutoModelForCausalLM|AutoModelForCausalLM.*{says}"
        ):
            apr.Session(other)
        assert other.config._attn_implementation == "sdpa"
    short = GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=VOCAB)
    )
    with pytest.warns(UserWarning, match="runs by rows"):  # too short to be measured
        s = apr.Session(short.eval(), max_tokens=256)
    with s:
        assert "positions up to 100" in s.spec.states.reason
        thread = s.thread([5] * 64)
        s.step([thread])
        thread.extend([5])
        with pytest.raises(apr.InvalidInput, match="keep threads shorter"):
            s.step([thread])
        assert len(thread) == 65 and s.stats.rows == 64


def test_a_second_attach_runs_no_forward():
    llama = build("llama")
    apr.Session(llama, max_tokens=256).close()
    calls = []
    hook = llama.model.register_forward_hook(lambda *_: calls.append(1))
    apr.Session(llama, max_tokens=256).close()
    assert not calls
    llama.model.layers[0].mlp = copy.deepcopy(llama.model.layers[0].mlp)
    apr.Session(llama, max_tokens=256).close()
    hook.remove()
    assert calls  # another structure is measured anew


# ---- handles -----------------------------------------------------------------------------------


def test_handles_are_not_copied_by_accident(llama):
    cache = apr.Cache(llama, max_tokens=512)
    with apr.Session(llama, max_tokens=512) as s:
        thread, region = s.thread(PROMPT), s.region([3])
        for handle, remedy in (
            (thread, "fork"),
            (region, "another view"),
            (s, "apr.Session"),
            (cache, None),
        ):
            for copied in (copy.copy, copy.deepcopy) if remedy else ():
                with pytest.raises(apr.InvalidInput, match=remedy):
                    copied(handle)
        with pytest.raises(apr.InvalidInput, match="deepcopy"):
            cache.__reduce_ex__(4)
        assert distance(s.step([thread])[0], stock(llama, PROMPT)[-1]) < CLOSE
        kids = thread.fork(2)
        for kid in kids:
            kid.extend([5])
        thread.join(kid for kid in kids)  # a generator is taken as it comes
        assert not any(kid.alive for kid in kids) and len(thread) == len(PROMPT) + 2
    cache.close()


def test_what_a_place_hides_matters(llama):
    """Negative control of the comparisons above: one wrong token is far away."""
    assert distance(stock(llama, PROMPT)[-1], stock(llama, [*PROMPT[:5], 9, *PROMPT[6:]])[-1]) > FAR


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", config)
    return adapted.eval()


def test_peft_models_and_an_adapter_for_each_row():
    adapted, base = lora(build("llama")), build("llama")
    want = adapted.generate(input_ids=IDS, **GREEDY)
    assert not torch.equal(want, generated(base))
    cache = apr.Cache(adapted, max_tokens=512)
    assert torch.equal(adapted.generate(input_ids=IDS, past_key_values=cache, **GREEDY), want)
    with apr.Session(adapted, max_tokens=512) as s:
        out = apr.decode(s, [s.thread(PROMPT)], **GREEDY)[0].tokens
    assert out == want[0, len(PROMPT) :].tolist()
    rows = dict(input_ids=torch.cat([IDS, IDS]), adapter_names=["default", "other"], **GREEDY)
    two = adapted.generate(**rows)
    assert not torch.equal(two[0], two[1])
    cache.reset()  # as after any change of adapters: what is stored was written by another
    with pytest.raises(apr.InvalidInput, match="share_rows=False"):
        adapted.generate(past_key_values=cache, **rows)
    cache.close()
    cache = apr.Cache(adapted, max_tokens=512, share_rows=False)
    assert torch.equal(adapted.generate(past_key_values=cache, **rows), two)
    cache.close()


def test_a_learned_prompt_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(apr.InvalidInput, match="learns a prompt"):
        apr.Session(peft.get_peft_model(build("llama"), config).eval())


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # 5.17 means the meta device
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_offloaded_models(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, device = build("llama"), torch.device("cpu")
    want = generated(model)
    more = [tmp_path] if where == "disk_offload" else []
    getattr(accelerate, where)(model, *more, execution_device=device)
    assert model.lm_head.weight.device.type == "meta"
    cache = apr.Cache(model, max_tokens=512)
    assert torch.equal(generated(model, cache), want)
    cache.close()
