"""DESIGN's oracles on every family: relabel, fork, join at max, join at sum, live views."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import apr
from apr import ops
from models import CLOSE, COMMON, FAMILIES, FAR, distance, random_weights, stock, tokens
from token_loop import Row, TokenLoop

PROMPT, A, B, C = tokens(11, 0), tokens(9, 1), tokens(6, 2), tokens(5, 3)


@pytest.fixture
def without_rotation(monkeypatch):
    """Switches re-rotation off: the negative control of everything that needs it."""

    def off():
        monkeypatch.setattr(ops.Plan, "rotation_table", lambda self, rotation, device: None)
        monkeypatch.setattr("apr.hf.attachment.self_test", lambda *_: None)  # it would refuse

    return off


def test_relabel(rotary, without_rotation):
    """The same tokens written elsewhere, seen at the same place, give the stock logits."""
    _, model = rotary
    want = stock(model, PROMPT + A)[-len(A) :]

    def run(base):
        with apr.Session(model, max_tokens=2048) as s:
            head, tail = s.segment(PROMPT), s.region(base=base)
            thread = s.thread(view=[(head, 0), (tail, len(PROMPT))], writes=tail)
            rows = []
            for token in A:
                thread.extend([token])
                rows.append(s.step([thread])[0])
            assert thread.position == len(PROMPT) + len(A) and len(thread) == thread.position
            return torch.stack(rows)

    for base in (0, 3, len(PROMPT), 60):
        assert distance(run(base), want) < CLOSE
    without_rotation()
    assert distance(run(len(PROMPT)), want) < CLOSE  # nothing to turn
    assert distance(run(60), want) > FAR


def test_fork(family):
    """Each child of a ragged packed run equals its own sequence through stock transformers."""
    _, model = family
    texts = [A, B, C]
    want = [stock(model, PROMPT + t)[len(PROMPT) :] for t in texts]
    schedule = [(3, 1, 2), (1, 1, 1), (4, 1, 1), (1, 3, 1)]
    with apr.Session(model, max_tokens=2048) as s:
        root = s.thread(PROMPT)
        children = root.fork(3)
        assert distance(s.step(children)[0], stock(model, PROMPT)[-1]) < CLOSE
        at = [0, 0, 0]
        for counts in schedule:
            for i, (child, n) in enumerate(zip(children, counts, strict=True)):
                child.extend(texts[i][at[i] : at[i] + n])
                at[i] += n
            got = s.step(children)
            for i in range(3):
                assert distance(got[i], want[i][at[i] - 1]) < CLOSE
        # Negative control: a sibling's logits are another thing.
        assert distance(got[0], want[1][at[1] - 1]) > FAR
        # Merging has power: a child that does not see the prompt differs.
        alone = s.thread(A[: at[0]])
        assert distance(s.step([alone])[0], want[0][at[0] - 1]) > FAR


def flat(prompt, children, tail, window=None):
    """Ids, positions and mask [1, 1, T, T] of prompt -> children side by side -> tail."""
    ids, positions, owner = list(prompt), list(range(len(prompt))), ["p"] * len(prompt)
    for i, child in enumerate(children):
        ids += child
        positions += range(len(prompt), len(prompt) + len(child))
        owner += [f"c{i}"] * len(child)
    start = len(prompt) + max(map(len, children))
    ids += tail
    positions += range(start, start + len(tail))
    owner += ["t"] * len(tail)
    n = len(ids)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(q + 1):
            sees = owner[k] in ("p", owner[q]) or owner[q] == "t"
            near = window is None or positions[q] - positions[k] < window
            mask[q, k] = sees and near
    return ids, torch.tensor([positions]), mask[None, None]


def test_join_at_max(family):
    """A join is one stock forward of the flattened tree under an explicit mask."""
    name, model = family
    ids, positions, mask = flat(PROMPT, [A, B], C, FAMILIES[name].window)
    # gpt2 and opt want the additive form of a 4-D mask, which serves all.
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    want = stock(model, ids, position_ids=positions, attention_mask=additive)
    with apr.Session(model, max_tokens=2048) as s:
        root = s.thread(PROMPT)
        children = root.fork(2)
        children[0].extend(A)
        children[1].extend(B)
        got = s.step(children)
        assert distance(got[0], want[len(PROMPT) + len(A) - 1]) < CLOSE
        assert distance(got[1], want[len(PROMPT) + len(A) + len(B) - 1]) < CLOSE
        root.join(children, positions="max")
        assert root.position == len(PROMPT) + len(A)
        assert len(root) == len(PROMPT) + len(A) + len(B)
        for i, token in enumerate(C):
            root.extend([token])
            got = s.step([root])[0]
            assert distance(got, want[len(ids) - len(C) + i]) < CLOSE
    # Negative control: with the plain causal mask the siblings see each other.
    causal = torch.full(mask.shape, torch.finfo(torch.float32).min).triu(1)
    wrong = stock(model, ids, position_ids=positions, attention_mask=causal)
    assert distance(got, wrong[-1]) > FAR


@pytest.mark.trap(11)
def test_yarn_scales_queries_and_keys_once(without_rotation):
    """YaRN stretches attention by a factor that sits in the rotated q and k: turning again must not
    repeat it.
    """
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
    }
    model = random_weights(LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=rope)))
    want = stock(model, PROMPT + A)[-1]

    def run(base):
        with apr.Session(model, max_tokens=2048) as s:
            head, tail = s.segment(PROMPT), s.region(base=base)
            thread = s.thread(view=[head, tail], writes=tail)
            thread.extend(A)
            return distance(s.step([thread])[0], want)

    assert run(base=700) < CLOSE
    without_rotation()
    assert run(base=700) > FAR


def test_join_at_sum(rotary, without_rotation):
    name, model = rotary
    loop = TokenLoop(model, FAMILIES[name])
    p, a, b = len(PROMPT), len(A), len(B)
    for i, t in enumerate(PROMPT):
        loop.step([Row("P", t, i, [("P", 0, i + 1)])])
    for block, text in (("A", A), ("B", B)):
        for i, t in enumerate(text):
            loop.step([Row(block, t, p + i, [("P", 0, p), (block, p, i + 1)])])
    want = []
    for i, t in enumerate(C):
        sees = [("P", 0, p), ("A", p, a), ("B", p + a, b), ("T", p + a + b, i + 1)]
        want.append(loop.step([Row("T", t, p + a + b + i, sees)])[0])

    def run():
        with apr.Session(model, max_tokens=2048) as s:
            root = s.thread(PROMPT)
            children = root.fork(2)
            children[0].extend(A)
            children[1].extend(B)
            s.step(children)
            root.join(children, positions="sum")
            assert root.position == len(root) == p + a + b
            rows = []
            for t in C:
                root.extend([t])
                rows.append(s.step([root])[0])
            return torch.stack(rows)

    assert distance(run(), torch.stack(want)) < CLOSE
    without_rotation()
    assert distance(run(), torch.stack(want)) > FAR


def hogwild_rows(p, texts, step, visibility, entered, order):
    """Rows of one step of workers: view of worker w = prompt, the others in order, own block
    last.
    """
    rows = []
    for w, text in texts.items():
        if not entered[w] <= step < entered[w] + len(text):
            continue
        own = step - entered[w]
        sees, end = [("P", 0, p)], p
        for other in order:
            if other == w:
                continue
            written = min(max(step - entered[other], 0), len(texts[other]))
            running = entered[other] <= step < entered[other] + len(texts[other])
            count = written + (1 if running and visibility == "current" else 0)
            if count:
                sees.append((other, end, count))
            end += count
        sees.append((w, end, own + 1))
        rows.append(Row(w, text[own], end + own, sees))
    return rows


@pytest.mark.parametrize("visibility", ["current", "previous"])
def test_live_views(rotary, visibility, without_rotation):
    """Three workers read each other while they write; one enters late, one ends early
    (Hogwild!).
    """
    name, model = rotary
    texts = {"A": tokens(9, 5), "B": tokens(4, 6), "C": tokens(6, 7)}
    entered = {"A": 0, "B": 0, "C": 3}
    p = len(PROMPT)
    loop = TokenLoop(model, FAMILIES[name])
    for i, t in enumerate(PROMPT):
        loop.step([Row("P", t, i, [("P", 0, i + 1)])])
    want = []
    for step in range(9):
        rows = hogwild_rows(p, texts, step, visibility, entered, "ABC")
        want.append({r.block: x for r, x in zip(rows, loop.step(rows), strict=True)})

    def run():
        worst = 0.0
        with apr.Session(model, max_tokens=4096) as s:
            prompt = s.segment(PROMPT)
            regions = {w: s.region(base=p) for w in texts}
            threads = {}
            for step in range(9):
                for w in texts:
                    if entered[w] == step:
                        others = [regions[o] for o in texts if o != w]
                        threads[w] = s.thread(
                            view=[prompt, *others, regions[w]],
                            writes=regions[w],
                            visibility=visibility,
                        )
                live = [w for w in threads if step < entered[w] + len(texts[w])]
                for w in live:
                    threads[w].extend([texts[w][step - entered[w]]])
                got = s.step([threads[w] for w in live])
                assert set(live) == set(want[step])
                for w, row in zip(live, got, strict=True):
                    worst = max(worst, distance(row, want[step][w]))
        return worst

    assert run() < CLOSE
    without_rotation()
    assert run() > FAR


def test_visibility_has_power(llama):
    """A step's own tokens are there ("current") or not ("previous")."""

    def last(visibility):
        with apr.Session(llama, max_tokens=2048) as s:
            prompt, a, b = s.segment(PROMPT), s.region(base=11), s.region(base=11)
            one = s.thread(view=[prompt, b, a], writes=a, visibility=visibility)
            two = s.thread(view=[prompt, a, b], writes=b, visibility=visibility)
            one.extend([5])
            two.extend([9])
            return s.step([one, two])

    assert distance(last("previous"), last("current")) > FAR
    with apr.Session(llama, max_tokens=2048) as s:
        alone = s.thread([*PROMPT, 5])
        assert distance(s.step([alone])[0], last("previous")[0]) < CLOSE


def test_group_think_slots(rotary):
    """Interleaved slots: two writers on one line of positions, each sees the other's earlier
    tokens.
    """
    family_name, model = rotary
    loop = TokenLoop(model, FAMILIES[family_name])
    p = len(PROMPT)
    for i, t in enumerate(PROMPT):
        loop.step([Row("P", t, i, [("P", 0, i + 1)])])

    with apr.Session(model, max_tokens=2048) as s:
        prompt = s.segment(PROMPT)
        x, y = s.region(base=p, stride=2), s.region(base=p + 1, stride=2)
        one = s.thread(view=[prompt, (y, p + 1), (x, p)], writes=x)
        two = s.thread(view=[prompt, (x, p), (y, p + 1)], writes=y)
        for i in range(5):
            one.extend([A[i]])
            two.extend([B[i]])
            got = s.step([one, two])
        assert one.position == p + 2 * 5 and two.position == p + 1 + 2 * 5
    # One block a token states each position by itself.
    for i in range(5):
        rows = []
        for name, text, first in (("x", A, p), ("y", B, p + 1)):
            other, start = ("y", p + 1) if name == "x" else ("x", p)
            sees = [("P", 0, p)]
            sees += [(f"{other}{j}", start + 2 * j, 1) for j in range(i)]
            sees += [(f"{name}{j}", first + 2 * j, 1) for j in range(i + 1)]
            rows.append(Row(f"{name}{i}", text[i], first + 2 * i, sees))
        want = loop.step(rows)
    assert distance(got, want) < CLOSE


def test_learned_positions_refuse_what_would_turn(learned):
    _, model = learned
    with apr.Session(model, max_tokens=2048) as s:
        assert not s.spec.can_rotate
        root = s.thread(PROMPT)
        children = root.fork(2)
        children[0].extend(A)
        children[1].extend(B)
        s.step(children)
        before = (len(root), root.position, s.stats.used_pages)
        with pytest.raises(apr.UnsupportedRope, match="re-rotated"):
            root.join(children, positions="sum")
        assert before == (len(root), root.position, s.stats.used_pages)
        head, region = s.segment(PROMPT), s.region(base=50)
        with pytest.raises(apr.UnsupportedRope):
            s.thread(view=[(head, 0), (region, 11)], writes=region)
        root.join(children, positions="max")
        root.extend(C)
        assert s.step([root]).isfinite().all()


def test_reencode_is_a_plain_sequence(family):
    _, model = family
    with apr.Session(model, max_tokens=2048) as s:
        root = s.thread(PROMPT)
        children = root.fork(2)
        children[0].extend(A)
        children[1].extend(B)
        s.step(children)
        root.join(children, reencode=True)
        assert root.tokens == PROMPT + A + B and root.queued == len(A) + len(B)
        assert distance(s.step([root])[0], stock(model, PROMPT + A + B)[-1]) < CLOSE
