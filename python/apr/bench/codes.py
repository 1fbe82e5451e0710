"""Keys and values in 8 bits: what that does to logits, to the cost of a step, and to memory."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

import apr
from apr import ops
from apr.bench import problems
from apr.bench.harness import Figure, in_turn, ratios
from apr.bench.loop import half_billion
from apr.bench.texts import loaded, pages_of
from apr.ops.codes import KV_DTYPES

KEPT: dict[str, torch.dtype | None] = {"bfloat16": None, **KV_DTYPES}
THEN = 32  # tokens whose logits are compared, behind each prompt
LAYERS = 4  # that kernels go through in turn, so that keys are not in the caches


def bench_codes(options: argparse.Namespace) -> Iterator[Figure]:
    """Logits of a text with keys and values in 8 bits beside those in bfloat16 (and those beside a
    model in float32); then steps of one and of 16 threads, attention and appends, each in turn.
    With --model, English text.
    """
    if options.model:
        model = loaded(options.model, torch.bfloat16)
        texts = pages_of(options.model, options.prefix, THEN)
    else:
        model, texts = half_billion(options.smoke), _any_texts(options.prefix + THEN)
    yield from _errors(model, texts, options.prefix)
    for threads in (1, 16):
        yield from _steps(model, options.prefix, threads, options.seconds)
    for shape in ((8192, 1, 0), (8192, 8, 256)):
        for heads in ((32, 8, 128), (14, 2, 64)):
            for dtype in (torch.bfloat16, torch.float32):
                yield from _kernels(
                    (256, 2, 9) if options.smoke else shape, heads, dtype, options.seconds / 4
                )


def _any_texts(length: int) -> list[list[int]]:
    return [[(7919 * i + 13 * n) % 500 + 3 for i in range(length)] for n in range(2)]


def _logits(model: Any, kv_dtype: torch.dtype | None, text: list[int]) -> Tensor:
    """Of its last THEN tokens, each in a step of its own: [THEN, vocab]."""
    with apr.Session(model, len(text), kv_dtype=kv_dtype) as session:
        thread = session.thread(text[:-THEN])
        rows = []
        for token in text[-THEN:]:
            thread.extend([token])
            rows.append(session.step([thread])[0])
    return torch.stack(rows)


def _errors(model: Any, texts: list[list[int]], prefix: int) -> Iterator[Figure]:
    found: dict[str, list[Tensor]] = {}
    exact = copy.deepcopy(model).float()  # a model that comes back has lost bits of its frequencies
    for text in texts:
        want = _logits(model, None, text)
        deviation, scores = want.std(-1), want.log_softmax(-1)
        rows = {name: _logits(model, dtype, text) for name, dtype in KEPT.items() if dtype}
        rows["a model in float32"] = _logits(exact, None, text)
        for name, got in rows.items():
            off = (got - want).square().mean(-1).sqrt() / deviation
            most = (got - want).abs().amax(-1) / deviation
            moved = (scores.exp() * (scores - got.log_softmax(-1))).sum(-1)  # KL divergence, nats
            same = (got.argmax(-1) == want.argmax(-1)).float()
            found.setdefault(name, []).append(torch.stack([off, most, moved, same]))
    for name, parts in found.items():
        all_parts = torch.cat(parts, 1)
        mean, furthest = all_parts.mean(1).tolist(), float(all_parts[1].max())
        note = (
            f"logits off by {mean[0]:.4f} of their deviation, at most {furthest:.3f}; "
            f"{mean[2]:.2e} nats; the same first token {mean[3]:.1%}"
        )
        print(f"{name}, {all_parts.shape[1]} tokens behind {prefix}: {note}", flush=True)
        facts = {"rms": mean[0], "most": furthest, "nats": mean[2], "same": mean[3]}
        yield Figure(name, [0.0], note, facts)


def _steps(model: Any, prefix: int, threads: int, seconds: float) -> Iterator[Figure]:
    with ExitStack() as stack:
        steps: dict[str, Callable[[], Any]] = {}
        sizes = {}
        for name, dtype in KEPT.items():
            room = prefix + threads * 1024
            session = stack.enter_context(apr.Session(model, room, kv_dtype=dtype))
            root = session.thread([(7919 * i) % 500 + 3 for i in range(prefix)])
            session.step([root])
            steps[name] = _stepper(session, root.fork(threads))
            sizes[name] = session.spec.bytes_per_token
        figures = in_turn(steps, seconds, most=400)
    plain = figures["bfloat16"]
    for name, figure in figures.items():
        median, low, high = ratios(figure, plain)
        share = sizes[name] / sizes["bfloat16"]
        figure.name = f"a step of {threads} on {prefix}, {name}"
        figure.note = (
            f"x {median:.2f} [{low:.2f}, {high:.2f}]; {sizes[name]} bytes a token, x {share:.2f}"
        )
        figure.facts = {"ratio": median, "bytes_per_token": sizes[name]}
        print(figure.line(), flush=True)
        yield figure


def _stepper(session: apr.Session, threads: list[apr.Thread]) -> Callable[[], Any]:
    tokens = itertools.count(3)

    def step() -> None:
        for thread in threads:
            thread.extend([next(tokens) % 500 + 3])
        session.advance(threads, lambda logits: logits)

    return step


def _kernels(
    shape: tuple[int, int, int], heads: tuple[int, int, int], dtype: torch.dtype, seconds: float
) -> Iterator[Figure]:
    """Attention, and the append of a prompt, of one layer on pages of each kind."""
    tree = "alone" if shape[1] == 1 else "tree"
    problem = problems.make(tree, shape, heads, dtype, torch.device("cpu"), LAYERS)
    whole = str(dtype).removeprefix("torch.")
    pools = {whole: problem.pools}
    for name, kept in KV_DTYPES.items():
        pools[f"{whole} in {name}"] = [_encoded(pool, kept) for pool in problem.pools]
    size = problem.pools[0].page_size
    tokens = min(1024, problem.pools[0].num_pages * size)
    sets = [(tokens, [ops.View(range(tokens // size), 0, tokens, 0, 0, own=True)])]
    k = torch.randn(tokens, heads[1], heads[2]).to(dtype)
    turns = itertools.count()

    def attend(kind: str) -> Callable[[], Any]:
        plan, q = problem.plan(), problem.q[0]
        return lambda: ops.attention(q, pools[kind][next(turns) % LAYERS], plan, problem.scale)

    def append(kind: str) -> Callable[[], Any]:
        plan = ops.plan(sets, pools[kind][0], heads[0])
        return lambda: ops.append(k, k, pools[kind][next(turns) % LAYERS], plan)

    for what, action in ((problem.name, attend), (f"append {tokens}, {heads}", append)):
        figures = in_turn({kind: action(kind) for kind in pools}, seconds)
        for kind, figure in figures.items():
            median, low, high = ratios(figure, figures[whole])
            figure.name = f"{what}, {kind}"
            figure.note = f"x {median:.2f} [{low:.2f}, {high:.2f}]"
            figure.facts = {"ratio": median}
            print(figure.line(), flush=True)
            yield figure


def _encoded(pool: ops.Pool, kept: torch.dtype) -> ops.Pool:
    (k, k_scales), (v, v_scales) = ops.encode(pool.k, kept), ops.encode(pool.v, kept)
    return ops.Pool(k, v, (k_scales, v_scales), pool.dtype)
