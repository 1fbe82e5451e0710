"""What methods do to text, prompts, processors and scores: nothing that was not asked for."""

from __future__ import annotations

import dataclasses
import math
import pickle
import time

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
)

import apr
from apr.__main__ import main
from apr.hf import compatibility
from apr.strategies import RewardModel, boxed, last_number, matching
from conftest import built
from models import COMMON, random_weights, tokens

PROMPT = "The sum is"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last or "
    "add_generation_prompt %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}{% if thinking is defined and not thinking %}<none>{% endif %}"
)


@pytest.fixture(scope="module")
def tagged():
    """A byte-level tokenizer with tags that are special tokens, and a model of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = [
        "<pad>",
        "<bos>",
        "<eos>",
        "<answer>",
        "</answer>",
        "<none>",
        "<|user|>",
        "<|assistant|>",
    ]
    letters = {
        text: i for i, text in enumerate([*tags, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    raw = Tokenizer(models.BPE(letters, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(tags)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(**{**COMMON, "vocab_size": len(letters)})
    return random_weights(LlamaForCausalLM(config)), tokenizer


class Says(LogitsProcessor):
    """Writes `text` and then the end token, whatever the model says; keeps its place between
    calls.
    """

    def __init__(self, ids):
        self.ids, self.at = [*ids, 2], 0

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -math.inf)
        out[:, self.ids[min(self.at, len(self.ids) - 1)]] = 0.0
        self.at += 1
        return out


class Uncopyable(Says):
    def __deepcopy__(self, memo):
        raise TypeError("holds a compiled grammar")


def says(tokenizer, text):
    return [Says(tokenizer(text, add_special_tokens=False).input_ids)]


def methods(tokenizer):
    """Every method whose threads write one text each, with what it needs."""
    return {
        "majority_vote": dict(n=3, extract=lambda text: text),
        "best_of_n": dict(n=3),
        "branching_vote": dict(n=3, extract=lambda text: text, entropy=math.inf),
        "group_think": dict(n=2, answer_prompt=None),
        "hogwild": dict(workers=2, answer_prompt=None),
        "parathinker": dict(n=2, first_finish=False),
        "tree_search": dict(n=2, depth=1, evaluate=len, stop=None),
        "mcts": dict(n=2, iterations=1, depth=1, reward=len, stop=None),
        "beam_search": dict(num_beams=1),
    }


# ---- text
# -------------------------------------------------------------------------------------------


CODE = "    return a + b\n"


@pytest.mark.parametrize("name", list(methods(None)))
def test_text_is_what_the_model_wrote(tagged, name):
    model, tokenizer = tagged
    written = f"{CODE}<answer> 5 </answer>\n"
    options = {**methods(tokenizer)[name], "max_new_tokens": 60}
    run = getattr(apr, name)
    result = run(model, tokenizer, PROMPT, logits_processor=says(tokenizer, written), **options)
    texts = [item.text for item in result.threads if item.finish == "eos"]
    assert texts and set(texts) == {written}
    plain = run(
        model,
        tokenizer,
        PROMPT,
        logits_processor=says(tokenizer, written),
        skip_special_tokens=True,
        **options,
    )
    texts = [item.text for item in plain.threads if item.finish == "eos"]
    assert texts and set(texts) == {f"{CODE} 5 \n"}


def test_extractors_and_verifiers_read_the_same_text(tagged):
    model, tokenizer = tagged
    heard = []
    result = apr.best_of_n(
        model,
        tokenizer,
        PROMPT,
        n=2,
        max_new_tokens=60,
        logits_processor=says(tokenizer, CODE),
        verifier=lambda text, thread: heard.append(text) or len(text),
    )
    assert heard == [CODE, CODE] and result.text == result.answer == CODE
    vote = apr.majority_vote(
        model,
        tokenizer,
        PROMPT,
        n=2,
        max_new_tokens=60,
        logits_processor=says(tokenizer, "<answer> 5 </answer>"),
        extract=matching(r"<answer>\s*(.*?)\s*</answer>"),
    )
    assert vote.votes == {"5": 2}


@pytest.mark.parametrize(
    "text, number",
    [
        ("at most 10-20", "20"),
        ("15 - 5 = 10, so 15-5", "5"),
        ("x-3 is (-3)", "-3"),
        ("it is \u22125", "-5"),
        ("a chance of .5", "0.5"),
        ("-.5", "-0.5"),
        ("$1,234.50 in all.", "1234.5"),
        ("12\u2009345\u202f678 people", "12345678"),
        ("one of 1, 2, 3", "3"),
        ("1,2", "2"),
        ("about 1e3", "1000"),
        ("1.5e-3 m", "0.0015"),
        ("version 1.2.3", "3"),
        ("8000.0", "8000"),
        ("-0.0", "0"),
        ("nothing", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"so \boxed{5}. Check: \boxed{", "5"),
        (r"\boxed{\boxed{7}} and } \boxed{\{8\}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{8,000}", "8000"),
        (r"\boxed{\$8000.0}", "8000"),
        (r"\boxed {8{,}000}", "8000"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ x-1 }", "x-1"),
        (r"\boxed{}", None),
        ("none", None),
    ],
)
def test_what_is_boxed(text, inside):
    assert boxed(text) == inside


# ---- prompts
# ----------------------------------------------------------------------------------------


def test_chats_go_through_the_template_with_its_options(tagged):
    model, tokenizer = tagged
    heard = []

    class Listens(LogitsProcessor):
        def __call__(self, ids, scores):
            heard.append(tokenizer.decode(ids[0]))
            return scores

    def ask(messages, **options):
        heard.clear()
        listener = [Listens()]
        apr.best_of_n(
            model, tokenizer, messages, n=1, max_new_tokens=1, logits_processor=listener, **options
        )
        return heard[0]

    user = {"role": "user", "content": "hello"}
    assert ask([user]) == "<|user|>hello<eos><|assistant|>"
    begun = [user, {"role": "assistant", "content": "The answer is"}]
    assert ask(begun) == "<|user|>hello<eos><|assistant|>The answer is"
    told = ask([user], chat_template_kwargs={"thinking": False})
    assert told == "<|user|>hello<eos><|assistant|><none>"
    with pytest.raises(apr.InvalidInput, match="no list of messages"):
        ask("hello", chat_template_kwargs={"thinking": False})
    with pytest.raises(apr.InvalidInput, match="chat_template_kwargs="):
        ask([user], thinking=False)


def test_a_reward_model_reads_the_roles(tagged):
    model, tokenizer = tagged
    classifier = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer), "num_labels": 1})
    )
    read = []
    reward = RewardModel(
        classifier, tokenizer, render=lambda prompt, text: read.append(prompt) or prompt + text
    )
    chat = [{"role": "user", "content": "hello"}]
    result = apr.best_of_n(model, tokenizer, chat, n=2, max_new_tokens=3, verifier=reward)
    assert read == ["<|user|>hello<eos><|assistant|>"] * 2 and len(result.scores) == 2


def test_no_tokenizer_where_nothing_needs_text():
    model, prompt = built("llama"), tokens(5)
    options = dict(max_new_tokens=4, eos_token_id=[])
    for name, more in methods(None).items():
        if name in ("group_think", "hogwild", "parathinker"):
            with pytest.raises(apr.InvalidInput, match="tokenizer: got None"):
                getattr(apr, name)(model, None, prompt, **options, **more)
            continue
        result = getattr(apr, name)(model, None, prompt, **options, **more)
        assert len(result.threads[0].tokens) == 4
    for name in ("majority_vote", "branching_vote", "skeleton"):
        with pytest.raises(apr.InvalidInput, match="tokenizer"):
            getattr(apr, name)(model, None, "text" if name == "skeleton" else prompt, **options)
    with pytest.raises(apr.InvalidInput, match="tokenizer: got None"):
        apr.best_of_n(model, None, "text", **options)


# ---- processors
# -------------------------------------------------------------------------------------


def test_every_thread_has_processors_of_its_own(tagged):
    model, tokenizer = tagged
    ids = tokenizer("one two", add_special_tokens=False).input_ids
    with apr.Session(model, max_tokens=2048) as s:
        kids = s.thread(tokens(5)).fork(3)
        outs = apr.decode(s, kids, do_sample=True, max_new_tokens=20, logits_processor=[Says(ids)])
        assert [out.tokens for out in outs] == [[*ids, 2]] * 3
        kids = s.thread(tokens(5)).fork(2)
        with pytest.raises(apr.InvalidInput, match=r"compiled grammar.*lambda thread"):
            apr.decode(s, kids, max_new_tokens=20, logits_processor=[Uncopyable(ids)])
        made = []
        outs = apr.decode(
            s,
            kids,
            max_new_tokens=20,
            logits_processor=lambda thread: made.append(thread) or [Uncopyable(ids)],
        )
        assert [out.tokens for out in outs] == [[*ids, 2]] * 2 and made == kids
        # One that enters late begins anew, though the first has been used.
        late = s.thread(tokens(5))
        (early,) = s.thread(tokens(5)).fork(1)
        written = {early: [], late: []}
        with apr.stream(s, [early], max_new_tokens=20, logits_processor=[Says(ids)]) as run:
            for i, step in enumerate(run):
                for thread, token in step.tokens.items():
                    written[thread].append(token)
                if i == 2:
                    run.add(late)
        assert written[early] == written[late] == [*ids, 2]


def test_processors_of_transformers_that_keep_a_state_are_copied_too(tagged):
    model, _ = tagged
    prompts = [tokens(5, 1), tokens(7, 2)]

    def run(numbers):
        mark = SynthIDTextWatermarkLogitsProcessor(
            3, [1, 2, 3], 64, 0, context_history_size=8, device="cpu"
        )
        with apr.Session(model, max_tokens=2048) as s:
            threads = [s.thread(prompts[i], request=i) for i in numbers]
            options = dict(max_new_tokens=10, do_sample=True, eos_token_id=[])
            outs = apr.decode(s, threads, logits_processor=[mark], **options)
        return [out.tokens for out in outs]

    assert run([0, 1]) == run([0]) + run([1])


def test_two_answers_to_who_ends_are_refused(tagged):
    model, tokenizer = tagged
    for name, more in (("majority_vote", dict(stop_early=True)), ("parathinker", {})):
        with pytest.raises(apr.InvalidInput, match="prune"):
            getattr(apr, name)(model, tokenizer, PROMPT, prune=lambda *_: (), **more)


def test_allowed_tokens_and_criteria_that_read_scores(tagged):
    model, _ = tagged
    rows, scores = set(), []

    def allowed(row, ids):
        rows.add(row)
        return [40 + row, 50]

    def stops(ids, score):
        scores.append(score)
        return bool(ids[0, -1] == 50)

    with apr.Session(model, max_tokens=2048) as s:
        outs = apr.decode(
            s,
            s.thread(tokens(5)).fork(3),
            do_sample=True,
            max_new_tokens=30,
            prefix_allowed_tokens_fn=allowed,
            stopping_criteria=[stops],
        )
    assert rows == {0, 1, 2}
    for row, out in enumerate(outs):
        assert set(out.tokens[:-1]) <= {40 + row} and out.tokens[-1] == 50 and out.finish == "stop"
    assert all(score.shape == (1, model.config.vocab_size) for score in scores)
    assert all(int(score.isfinite().sum()) == 2 for score in scores)


@pytest.mark.parametrize(
    "value, error, says",
    [
        (-math.inf, apr.InvalidInput, "no token is left.*let them allow an end token"),
        (math.inf, apr.NonFiniteLogits, "a logits processor made scores of inf"),
        (math.nan, apr.NonFiniteLogits, "a logits processor made scores of nan"),
    ],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_nothing_to_choose_from_names_thread_and_step(tagged, value, error, says, sampled):
    model, _ = tagged

    class Breaks(LogitsProcessor):
        def __call__(self, ids, scores):
            return torch.full_like(scores, value) if ids.shape[1] == 8 else scores

    with apr.Session(model, max_tokens=2048) as s:
        thread = s.thread(tokens(5))
        options = dict(do_sample=sampled, max_new_tokens=9, eos_token_id=[])
        with pytest.raises(error, match=rf"<Thread {thread._id},.*step 4 of this run: .*{says}"):
            apr.decode(s, [thread], logits_processor=[Breaks()], **options)
        assert len(thread) == 8
        assert len(apr.decode(s, [thread], **options)[0].tokens) == 9


# ---- what samples
# -----------------------------------------------------------------------------------


def test_a_temperature_samples(tagged):
    model, tokenizer = tagged
    options = dict(temperature=0.8, max_new_tokens=6, eos_token_id=[255])
    config = GenerationConfig(**options)
    one = apr.best_of_n(model, tokenizer, PROMPT, n=4, generation_config=config)
    other = apr.best_of_n(model, tokenizer, PROMPT, n=4, **options)
    assert [t.tokens for t in one.threads] == [t.tokens for t in other.threads]
    assert len({tuple(t.tokens) for t in one.threads}) == 4
    greedy = apr.best_of_n(model, tokenizer, PROMPT, n=3, do_sample=False, max_new_tokens=6)
    assert len({tuple(t.tokens) for t in greedy.threads}) == 1
    with apr.Session(model, max_tokens=2048) as s:
        warm = apr.decode(s, s.thread(tokens(5)).fork(4), **options)
        cold = apr.decode(s, s.thread(tokens(5)).fork(4), max_new_tokens=6, eos_token_id=[])
    assert len({tuple(t.tokens) for t in warm}) == 4 and len({tuple(t.tokens) for t in cold}) == 1


@pytest.mark.parametrize(
    "make",
    [
        int,
        list,
        torch.tensor,
        lambda ids: torch.tensor(ids).numpy(),
        lambda ids: [torch.tensor(i) for i in ids],
    ],
)
def test_end_tokens_in_any_form(tagged, make):
    model, _ = tagged
    with apr.Session(model, max_tokens=2048) as s:
        free = apr.decode(s, [s.thread(tokens(5))], max_new_tokens=8, eos_token_id=[])[0].tokens
        end = free[3]
        given = make(end) if make is int else make([end, 1])
        out = apr.decode(s, [s.thread(tokens(5))], max_new_tokens=8, eos_token_id=given)[0]
    assert out.finish == "eos" and out.tokens == free[: free.index(end) + 1]


# ---- scores
# -----------------------------------------------------------------------------------------


def test_a_verifier_may_abstain(tagged):
    model, tokenizer = tagged

    def best(*values):
        given = iter(values)
        return apr.best_of_n(
            model, tokenizer, PROMPT, n=4, max_new_tokens=4, verifier=lambda *_: next(given)
        )

    first = best(math.nan, 1.0, 5.0, None)
    assert first.text == first.answer == first.threads[2].text
    assert [math.isnan(x) for x in first.scores] == [True, False, False, True]
    nobody = best(None, None, None, math.nan)
    assert nobody.answer is None and nobody.text == nobody.threads[0].text
    with pytest.raises(apr.InvalidInput, match=r"verifier: got 'good'.*None to abstain"):
        best("good", 1, 1, 1)


def test_weights_abstain_and_searches_want_numbers(tagged):
    model, tokenizer = tagged
    weights = iter([2.0, None, math.nan, 1.0])
    vote = apr.majority_vote(
        model,
        tokenizer,
        PROMPT,
        n=4,
        max_new_tokens=4,
        extract=lambda text: "same",
        weight=lambda text, thread: next(weights),
    )
    assert vote.votes == {"same": 3.0}
    for name, more in (("mcts", "reward"), ("tree_search", "evaluate")):
        with apr.Session(model, max_tokens=2048) as s:
            with pytest.raises(apr.InvalidInput, match=f"{more}: got None"):
                options = {more: lambda text: None, "max_new_tokens": 3}
                getattr(apr, name)(s, tokenizer, PROMPT, n=2, **options)
            assert s.stats.threads == 0


def test_a_result_is_data(tagged):
    model, tokenizer = tagged
    result = apr.majority_vote(model, tokenizer, PROMPT, n=3, max_new_tokens=4)
    again = pickle.loads(pickle.dumps(result))
    assert [t.tokens for t in again.threads] == [t.tokens for t in result.threads]
    assert again.trace.tree() == result.trace.tree()
    assert dataclasses.asdict(result)["threads"][0]["tokens"] == result.threads[0].tokens


# ---- the command line
# -------------------------------------------------------------------------------


def test_model_output_is_printed_as_it_is(tagged, tmp_path, capsys):
    model, tokenizer = tagged
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    markup = "[/INST] [bold]"
    arguments = ["run", "--model", str(tmp_path), "--prompt", markup, "--n", "2"]
    assert main([*arguments, "--max-new-tokens", "4", "--method", "best_of_n"]) == 0
    assert "answer" in capsys.readouterr().out


def test_a_newer_transformers_warns_and_names_the_range():
    compatibility.warn_if_untested(f"{compatibility.NEWEST}.3")
    with pytest.warns(UserWarning, match=rf"{compatibility.OLDEST} to {compatibility.NEWEST}"):
        compatibility.warn_if_untested("99.0.0")


@pytest.mark.parametrize("read", [last_number, boxed])
@pytest.mark.parametrize("piece", [r"\boxed{", "1", "1,111", "{", "-", "1e", ".", "}"])
def test_an_answer_is_read_in_time_out_of_any_text(read, piece):
    """A model that repeats itself; what is quadratic takes minutes at this length."""
    began = time.perf_counter()
    read(piece * (300_000 // len(piece)))
    assert time.perf_counter() - began < 3.0
