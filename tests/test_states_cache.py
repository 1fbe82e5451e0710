"""`apr.Cache` in generate(), for models with layer states: the tokens are stock's."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import GenerationConfig

import apr
from apr.hf import cache_rows
from apr.hf.compatibility import CACHE_ARGUMENTS
from conftest import built
from models import CLOSE, FAR, distance, stock, tokens

PROMPT, A, B = tokens(21, 0), tokens(9, 1), tokens(6, 2)
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by rows:UserWarning")


# MiniMax's own cache loses the states of beams and of padded rows.
LOST = ("minimax-beams", "minimax-padded")


@pytest.fixture(params=["qwen3_next", "lfm2", "falcon_h1", "jamba", "minimax", "mamba"])
def hybrid(request):
    return built(request.param)


@pytest.fixture
def lfm2():
    return built("lfm2")


def argument(model):
    """What this transformers calls a cache that a model is given."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in parameters)


def generated(model, how, cache=None, **options):
    options |= {"max_new_tokens": 10, "do_sample": False}
    ids, mask = torch.tensor([PROMPT]), torch.ones(1, len(PROMPT), dtype=torch.long)
    if how == "beams":
        options |= {"num_beams": 3, "num_return_sequences": 2}
    if how == "sample":
        options |= {"do_sample": True, "top_k": 20, "num_return_sequences": 3}
    if how == "padded":
        ids = torch.tensor([PROMPT[:15], [0] * 6 + PROMPT[6:15]])
        mask = torch.tensor([[1] * 15, [0] * 6 + [1] * 9])
    if cache is not None:
        options[argument(model)] = cache
    settings = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    torch.manual_seed(5)
    run = model.generate
    out = run(ids, attention_mask=mask, generation_config=settings, **options)
    if how == "turns":
        ids = torch.tensor([out[0].tolist() + B])
        mask = torch.ones_like(ids)
        out = run(ids, attention_mask=mask, generation_config=settings, **options)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("how", ["greedy", "beams", "sample", "padded", "turns"])
def test_generate(hybrid, how, request):
    cache = apr.Cache(hybrid, max_tokens=2048)
    got = generated(hybrid, how, cache)
    lost = request.node.callspec.id in LOST
    assert (got == generated(hybrid, how)) != lost
    if how == "padded":  # its second row, without the padding
        (alone,) = hybrid.generate(
            torch.tensor([PROMPT[6:15]]),
            max_new_tokens=10,
            do_sample=False,
            use_cache=False,
            eos_token_id=None,
        )
        assert got[1] == alone[9:].tolist()
    elif lost:
        assert got == generated(hybrid, how, use_cache=False)
    held = cache.session.stats
    assert held.states <= 2 * len(cache.threads) and cache.threads
    for thread in cache.threads:
        assert cache.session.table.ask().nearest_state(thread._id, len(thread)) == len(thread)
    cache.close()


@pytest.mark.parametrize("keeps", [(9, 15), (0, 15)])
def test_prompts_that_keep_different_parts(hybrid, keeps):
    """The next prompts share some tokens of what is stored, or none: for each row another count."""
    first = torch.tensor([PROMPT, PROMPT])
    other = [[*PROMPT[:n], *tokens(len(PROMPT) + 2 - n, 7)] for n in keeps]
    cache = apr.Cache(hybrid, max_tokens=1024)
    settings = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    options = {"generation_config": settings, "max_new_tokens": 6, "do_sample": False}
    given = {argument(hybrid): cache}
    hybrid.generate(first, **given, **options)
    got = hybrid.generate(torch.tensor(other), **given, **options)
    assert torch.equal(got, hybrid.generate(torch.tensor(other), **options))
    cache.close()


def test_several_tokens_behind_a_state_that_takes_one():
    """Where the model's own code would answer wrongly, and does in its own cache."""
    model = built("jamba")
    cache = apr.Cache(model, max_tokens=512)
    generated(model, "greedy", cache)
    text = cache.threads[0].tokens
    ids = torch.tensor([A[:3]])
    with torch.no_grad():
        with pytest.raises(apr.InvalidInput, match="one at a time"):
            model(ids, past_key_values=cache)
        for i in range(3):
            got = model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1]
        assert distance(got, stock(model, text + A[:3])[-1]) < CLOSE
        own = model(torch.tensor([text]), use_cache=True).past_key_values
        got = model(ids, past_key_values=own).logits[0, -1]
        assert distance(got, stock(model, text + A[:3])[-1]) > FAR
    cache.close()


def test_padding_that_would_enter_a_state_is_refused(lfm2):
    cache = apr.Cache(lfm2, max_tokens=512)
    ids, mask = torch.tensor([PROMPT] * 2), torch.ones(2, len(PROMPT), dtype=torch.long)
    hole = mask.clone()
    hole[1, -6:] = 0
    with pytest.raises(apr.InvalidInput, match="padding behind real tokens"):
        lfm2(ids, attention_mask=hole, past_key_values=cache)
    with pytest.raises(apr.InvalidInput, match="padding alone"):
        lfm2(ids, attention_mask=mask * torch.tensor([[1], [0]]), past_key_values=cache)
    with torch.no_grad():
        lfm2(ids, attention_mask=mask, past_key_values=cache)
        longer = torch.cat([mask, torch.tensor([[1, 1], [0, 1]])], 1)
        with pytest.raises(apr.InvalidInput, match="padding behind stored tokens"):
            lfm2(ids[:, :2], attention_mask=longer, past_key_values=cache)
        with pytest.raises(apr.InvalidInput, match="padding alone"):
            lfm2(
                ids[:, :1],
                attention_mask=longer[:, :-1] * 0 + mask.new_tensor([[1] * len(PROMPT) + [0]] * 2),
                past_key_values=cache,
            )
        got = lfm2(ids[:, :2], past_key_values=cache).logits[1, -1]
    assert distance(got, stock(lfm2, PROMPT + PROMPT[:2])[-1]) < CLOSE
    cache.close()


def test_beams_and_a_crop(lfm2):
    cache = apr.Cache(lfm2, max_tokens=512)
    with torch.no_grad():
        lfm2(torch.tensor([PROMPT] * 2), past_key_values=cache)
        for token in A[:3]:
            cache.reorder_cache(torch.tensor([0, 0]))
            lfm2(torch.tensor([[token], [token - 1]]), past_key_values=cache)
        cache.crop(-2)
        text = cache.threads[1].tokens
        got = lfm2(torch.tensor([B[:2]] * 2), past_key_values=cache).logits[1]
    assert text == PROMPT + A[:1]
    assert distance(got, stock(lfm2, text + B[:2])[-2:]) < CLOSE
    cache.close()


def test_a_copy_of_a_copy_goes_on(lfm2):
    """Its threads have logits, and nothing but the text of a thread that has gone on."""
    first = apr.Cache(lfm2, max_tokens=1024)
    with torch.no_grad():
        lfm2(torch.tensor([PROMPT]), past_key_values=first)
        first.session.step(first.threads)
        second = copy.deepcopy(first)
        lfm2(torch.tensor([A]), past_key_values=first)
        third = copy.deepcopy(second)
        got = lfm2(torch.tensor([B]), past_key_values=third).logits[0]
    assert distance(got, stock(lfm2, PROMPT + B)[-len(B) :]) < CLOSE
    for cache in (first, second, third):
        cache.close()


def test_held_states_have_no_graph(lfm2):
    cache = apr.Cache(lfm2, max_tokens=512)
    for _ in range(2):
        lfm2(torch.tensor([A]), past_key_values=cache)
    (batch, _), *_ = cache.session.table.states._where.values()
    assert not any(x.requires_grad for x in cache_rows.leaves(batch.cache))
    cache.close()


def test_generate_goes_on_behind_a_crop(lfm2):
    """The state behind a cut is made again; transformers' own cache cannot."""
    cache = apr.Cache(lfm2, max_tokens=512)
    generated(lfm2, "greedy", cache)
    cache.crop(-5)
    text = cache.threads[0].tokens
    with torch.no_grad():
        got = lfm2(torch.tensor([A[:2]]), past_key_values=cache).logits[0]
    assert distance(got, stock(lfm2, text + A[:2])[-2:]) < CLOSE
    cache.close()


def test_threads_of_a_cache_go_on_in_a_session(lfm2):
    cache = apr.Cache(lfm2, max_tokens=512)
    generated(lfm2, "sample", cache)
    (child,) = cache.threads[1].fork(1)
    child.extend(A)
    got = cache.session.step([child])[0]
    assert distance(got, stock(lfm2, child.tokens)[-1]) < CLOSE
    cache.close()


@pytest.mark.parametrize("name", ["lfm2", "mamba", "minimax"])
@pytest.mark.parametrize("argument", ["past_key_values", "cache", "cache_params"])
def test_a_cache_by_any_of_its_names(name, argument):
    """A model overlooks names that are not its own, and would begin anew."""
    model = built(name)
    cache = apr.Cache(model, max_tokens=512)
    with torch.no_grad():
        for ids in (PROMPT, A[:1], A[1:2]):
            out = model(torch.tensor([ids]), **{argument: cache})
    assert distance(out.logits[0, -1], stock(model, PROMPT + A[:2])[-1]) < CLOSE
    assert cache.threads[0].tokens == PROMPT + A[:2]
    cache.close()


@pytest.mark.parametrize("name", ["lfm2", "mamba", "minimax", "llama"])
@pytest.mark.parametrize("stored", [0, 5])
def test_a_call_inside_of_a_forward_is_refused(name, stored):
    model = built(name)
    cache = apr.Cache(model, max_tokens=512)
    given = {argument(model): cache}
    if stored:
        model(torch.tensor([PROMPT[:stored]]), **given)

    def call(*_):
        if not inside:
            inside.append(True)
            model(torch.tensor([A]))

    inside: list[bool] = []
    part = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
    hook = part.register_forward_hook(call)
    with pytest.raises(apr.InvalidInput, match="inside of its own forward"):
        model(torch.tensor([PROMPT[stored : stored + 1]]), **given)
    hook.remove()
    with torch.no_grad():
        out = model(torch.tensor([PROMPT[stored : stored + 1]]), **given)
    assert distance(out.logits[0, -1], stock(model, PROMPT[: stored + 1])[-1]) < CLOSE
    cache.close()


@pytest.mark.parametrize("name", ["minimax", "lfm2", "jamba"])
def test_positions_that_count_padding_are_refused(name):
    """Left to the cache they count tokens, and padded rows are right."""
    model = built(name)
    cache = apr.Cache(model, max_tokens=512)
    ids, mask = torch.tensor([A, [0, 0, *A[:-2]]]), torch.ones(2, len(A), dtype=torch.long)
    mask[1, :2] = 0
    given = {argument(model): cache, "attention_mask": mask}
    with torch.no_grad():
        with pytest.raises(apr.InvalidInput, match="count the tokens without padding"):
            model(ids, position_ids=torch.arange(len(A))[None], **given)
        out = model(ids, **given)
    assert distance(out.logits[1, -1], stock(model, A[:-2])[-1]) < CLOSE
    cache.close()


def test_a_model_that_attends_by_itself_is_refused():
    with pytest.raises(apr.UnsupportedModel, match=r"apr\.Session"):
        apr.Cache(built("bloom"), max_tokens=256)
