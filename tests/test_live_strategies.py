"""Methods whose threads read each other: log-probabilities against the token loop's explicit
lists.
"""

from __future__ import annotations

import pytest
import torch

import apr
from apr.strategies import Board
from apr.strategies.hogwild import NAMES
from hogwild_loop import HogwildLoop
from models import FAMILIES, build, tokens
from test_beam_search import Words
from token_loop import Row, TokenLoop

PROMPT = tokens(11, 0)
STARTS = [tokens(2 + i % 3, 5 + i) for i in range(6)]


def logprob_of(logits, token):
    return float(logits.log_softmax(-1)[token])


def group_think_oracle(model, family, most, layout, slot, written, events, current=False):
    """Log-probability of each thinker's tokens, from the statement of what each may see.

    A thinker sees the prompt, of every other one what was there before the step (`current`: with
    the step's too), and its own tokens up to the row's. The last token of one who has ended is a
    sealed segment's: it is there in the step that runs it. events: (step, thinker that enters) and
    (step, -1 - thinker that leaves).
    """
    loop = TokenLoop(model, FAMILIES[family])
    p = len(PROMPT)
    for i, token in enumerate(PROMPT):
        loop.step([Row("P", token, i, [("P", 0, i + 1)])])
    streams = [[*STARTS[k], *written[k]] for k in range(len(written))]

    def place(k, i):
        return p + k * slot + i if layout == "slots" else p + i * most + k

    got = [[] for _ in written]
    lengths, pending = [0] * len(written), [[] for _ in written]
    live = set()
    for number in range(200):
        for at, who in events:
            if at == number and who >= 0:
                live.add(who)
                pending[who] = list(range(len(STARTS[who])))
            elif at == number:
                live.discard(-1 - who)
        if not live:
            break
        rows, last = [], {}
        for k in range(len(written)):
            for i in pending[k]:
                sees = [("P", 0, p)]
                for other in range(len(written)):
                    count = i + 1 if other == k else lengths[other]
                    if other != k and (current or other not in live):
                        count += len(pending[other])
                    sees += [(f"{other}.{j}", place(other, j), 1) for j in range(count)]
                rows.append(Row(f"{k}.{i}", streams[k][i], place(k, i), sees))
                last[k] = len(rows) - 1
        logits = loop.step(rows)
        for k in range(len(written)):
            lengths[k] += len(pending[k])
            pending[k] = []
            if k in live:
                got[k].append(logprob_of(logits[last[k]], streams[k][lengths[k]]))
                # The last sampled token is queued; others see it once it has run.
                pending[k] = [lengths[k]]
                if lengths[k] == len(streams[k]) - 1:
                    live.discard(k)
    return got


@pytest.mark.parametrize("layout", ["slots", "interleaved"])
@pytest.mark.parametrize("family,n", [("llama", 2), ("llama", 3), ("cohere", 5), ("qwen2", 3)])
def test_group_think_sees_the_others_up_to_the_step_before(family, n, layout):
    """A thinker enters at step 7, one leaves at step 12; some meet an end token early."""
    model = build(family)

    def each_step(number, groups):
        if number == 7:
            groups[0].enter()
        if number == 12 and len(groups[0].thinkers) > 1:
            threads = [member.thread for member in groups[0].everyone]
            left.append(threads.index(groups[0].thinkers[1]))
            groups[0].leave(groups[0].thinkers[1])

    left = []
    with apr.Session(model, max_tokens=8192) as s:
        result = apr.group_think(
            s,
            Words(),
            PROMPT,
            n=n,
            most=n + 1,
            layout=layout,
            start=STARTS.__getitem__,
            answer_prompt=None,
            max_new_tokens=20,
            eos_token_id=list(range(60, 63)),
            temperature=1.5,
            seed=2,
            each_step=each_step,
        )
        assert s.stats.used_pages == 0 and s.stats.threads == 0
    written = [item.tokens for item in result.threads]
    slot = max(map(len, STARTS[: n + 1])) + 20
    events = [(0, k) for k in range(n)] + [(7, n)] + [(12, -1 - k) for k in left]
    assert left and len(written) == n + 1
    want = group_think_oracle(model, family, n + 1, layout, slot, written, events)
    for item, expected in zip(result.threads, want, strict=True):
        assert len(expected) == len(item.tokens)
        assert max(abs(a - b) for a, b in zip(item.logprobs, expected, strict=True)) < 2e-4
    # Power: thinkers that see the others' current tokens too would get other numbers.
    other = group_think_oracle(model, family, n + 1, layout, slot, written, events, current=True)
    flat = [a - b for x, y in zip(want, other, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(map(abs, flat)) > 1e-2


def test_group_think_answers_jointly_and_in_batches():
    model = build("llama")
    prompts = [tokens(5 + i, i) for i in range(3)]
    options = {
        "n": 3,
        "start": STARTS.__getitem__,
        "max_new_tokens": 6,
        "answer_prompt": [9, 10],
    }
    with apr.Session(model, max_tokens=8192) as s:
        many = apr.group_think(s, Words(), prompts, answer_tokens=5, eos_token_id=[], **options)
        assert s.stats.used_pages == 0 and s.stats.threads == 0
        for ids, one in zip(prompts, many, strict=True):
            assert len(one.text.split()) == 5
            assert [len(t.tokens) for t in one.threads] == [6, 6, 6]
            alone = apr.group_think(
                s, Words(), ids, answer_tokens=5, eos_token_id=[], seed=0, **options
            )
            if ids is prompts[0]:  # the same request number, so the same samples
                assert alone.text == one.text
    for bad, word in (
        ({"layout": "rows"}, "layout"),
        ({"most": 2}, "most"),
        ({"start": lambda number: []}, "start"),
    ):
        with pytest.raises(apr.InvalidInput, match=word):
            apr.group_think(model, Words(), PROMPT, **{**options, **bad})


def test_lengths_count_own_tokens_alone():
    """A live view grows with everybody's tokens: processors that count must not take them for own
    ones.
    """
    model = build("llama")
    result = apr.group_think(
        model,
        Words(),
        PROMPT,
        n=4,
        start=STARTS.__getitem__,
        answer_prompt=None,
        max_new_tokens=20,
        min_new_tokens=10,
        eos_token_id=list(range(2, 90)),
    )
    assert all(len(t.tokens) > 10 for t in result.threads)
    forced = apr.group_think(
        model,
        Words(),
        PROMPT,
        n=4,
        start=lambda i: [100],
        answer_prompt=None,
        max_new_tokens=6,
        forced_eos_token_id=2,
        eos_token_id=[],
    )
    assert [t.tokens[-1] for t in forced.threads] == [2] * 4


@pytest.mark.parametrize("method", ["group_think", "hogwild"])
def test_a_kept_exception_keeps_no_pages(method):
    options = {"group_think": {"start": lambda i: [100 + i]}, "hogwild": {"board": BOARD}}[method]
    kept = []

    def interrupt(step):
        raise KeyboardInterrupt

    with apr.Session(build("llama"), max_tokens=4096) as s:
        try:
            getattr(apr, method)(
                s, Words(), [tokens(9), tokens(7)], max_new_tokens=6, on_step=interrupt, **options
            )
        except KeyboardInterrupt as error:
            kept.append(error)
        assert kept and s.stats.used_pages == 0 and s.table.ask().num_segments == 0


def test_models_without_rotation_think_in_slots():
    model = build("gpt2")
    result = apr.group_think(
        model,
        Words(),
        PROMPT,
        n=2,
        start=STARTS.__getitem__,
        answer_prompt=None,
        max_new_tokens=5,
        eos_token_id=[],
    )
    assert [len(t.tokens) for t in result.threads] == [5, 5]
    assert torch.tensor(result.threads[0].logprobs).isfinite().all()


BOARD = Board(
    past=[101, 102],
    others=[103],
    own=[104, 105],
    step=lambda name, number: [106 + NAMES.index(name), 112 + number % 8],
    end=[7],
    check=[121, 122],
)
LOOP_BOARD = Board(
    past=[101, 102],
    others=[103],
    own=[104, 105],
    step=lambda index, number: [106 + index, 112 + number % 8],
    end=[7],
    check=[121, 122],
)
HOGWILD = {
    "answer_prompt": None,
    "max_new_tokens": 24,
    "eos_token_id": [],
    "temperature": 1.5,
    "sequence_bias": {(7,): 6.0},  # steps end often; log-probabilities are the model's own
    "check_every": 9,
}


@pytest.mark.parametrize("layout", ["combined", "interleaved", "contiguous"])
@pytest.mark.parametrize("family,workers", [("llama", 2), ("cohere", 3), ("qwen2", 5)])
def test_hogwild_by_explicit_lists(family, workers, layout):
    """Every log-probability, with a worker that enters at step 7 and one that leaves at step 12."""
    model = build(family)

    def each_step(number, teams):
        if number == 7:
            teams[0].enter()
        if number == 12:
            teams[0].leave(teams[0].workers[1])

    with apr.Session(model, max_tokens=8192) as s:
        result = apr.hogwild(
            s,
            Words(),
            PROMPT,
            workers=workers,
            layout=layout,
            board=BOARD,
            each_step=each_step,
            **HOGWILD,
        )
        assert s.stats.used_pages == 0 and s.stats.threads == 0
    assert len(result.threads) == workers + 1
    assert result.threads[1].finish == "left" and len(result.threads[1].tokens) == 12
    turns = sum(t.tokens[:-1].count(7) for t in result.threads)
    assert turns >= workers  # pages were turned, or there would be little to see

    loop = HogwildLoop(model, FAMILIES[family], PROMPT, LOOP_BOARD, layout, HOGWILD["check_every"])
    written = [t.tokens for t in result.threads]
    for k in range(workers):
        loop.enter([*written[k], None] if k == 1 else written[k])
    for number in range(40):
        if number == 7:
            loop.enter(written[workers])
        if number == 12:
            loop.leave(loop.everyone[1])
        if not loop.live:
            break
        loop.step()
    worst = 0.0
    for item, writer in zip(result.threads, loop.everyone, strict=True):
        assert len(item.logprobs) == len(writer.logprobs)
        worst = max(
            worst, *(abs(a - b) for a, b in zip(item.logprobs, writer.logprobs, strict=True))
        )
    assert worst < 3e-4


def test_hogwild_oracle_has_power():
    """What one layout writes is not what the rules of another give."""
    model = build("llama")
    result = apr.hogwild(
        model, Words(), PROMPT, workers=2, layout="combined", board=BOARD, **HOGWILD
    )
    loop = HogwildLoop(model, FAMILIES["llama"], PROMPT, LOOP_BOARD, "interleaved", 9)
    for item in result.threads:
        loop.enter(item.tokens)
    while loop.live:
        loop.step()
    pairs = zip(result.threads[0].logprobs, loop.everyone[0].logprobs, strict=True)
    assert max(abs(a - b) for a, b in pairs) > 1e-2


def test_hogwild_teams_answers_and_ends():
    model = build("llama")
    prompts = [tokens(6 + i, i) for i in range(3)]
    options = {**HOGWILD, "answer_prompt": [9, 9], "max_new_tokens": 10}
    with apr.Session(model, max_tokens=8192) as s:
        many = apr.hogwild(s, Words(), prompts, workers=3, board=BOARD, answer_tokens=4, **options)
        alone = apr.hogwild(
            s, Words(), prompts[0], workers=3, board=BOARD, answer_tokens=4, **options
        )
        assert [t.tokens for t in many[0].threads] == [t.tokens for t in alone.threads]
        assert many[0].text == alone.text and len(alone.text.split()) == 4
        stopped = apr.hogwild(
            s,
            Words(),
            prompts[0],
            workers=2,
            board=BOARD,
            done=lambda text: len(text.split()) >= 4,
            **options,
        )
        assert [t.finish for t in stopped.threads] == ["done", "done"]
        assert [len(t.tokens) for t in stopped.threads] == [4, 4]

        # A worker that ends in the very step in which it is done ends the others too.
        third = stopped.threads[0].tokens[3]
        at_once = apr.hogwild(
            s,
            Words(),
            prompts[0],
            workers=2,
            board=BOARD,
            done=lambda text: len(text.split()) >= 4,
            **{**options, "eos_token_id": [third]},
        )
        assert max(len(t.tokens) for t in at_once.threads) <= 4
        bare = Board(past=[], others=[], own=[], step=lambda *_: [], end=[7], check=[])
        for layout in ("combined", "interleaved", "contiguous"):
            apr.hogwild(s, Words(), prompts[0], workers=2, board=bare, layout=layout, **options)

        def interrupt(step):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            apr.hogwild(s, Words(), prompts, board=BOARD, on_step=interrupt, **options)
        assert s.stats.used_pages == 0 and s.stats.threads == 0
    for bad, word in (
        ({"layout": "rows"}, "layout"),
        ({"workers": 0}, "n: got 0"),
        ({"board": Board(end="", past=[], others=[], own=[], step=lambda *_: [5])}, "board.end"),
    ):
        with pytest.raises(apr.InvalidInput, match=word):
            apr.hogwild(model, Words(), PROMPT, **{**options, "board": BOARD, **bad})
    with pytest.raises(apr.UnsupportedRope):
        apr.hogwild(build("gpt2"), Words(), PROMPT, board=BOARD, **options)
