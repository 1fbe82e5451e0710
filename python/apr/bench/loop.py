"""A loop beside what people would use instead: steps, whole runs, memory, and where a step's time
goes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
)

import apr
from apr.bench.harness import Figure
from apr.hf.packed import PackedForward

SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "eos_token_id": None,
}
# Rows of keys and values that stock's batched cache may come to; more takes minutes a step here.
MOST_STOCK_TOKENS = 1 << 16
ANSWER = 128  # tokens of an answer of a whole run


def half_billion(smoke: bool = False) -> Any:
    """The shape of Qwen2-0.5B with random weights, in bfloat16; small with `smoke`."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64 if smoke else 896,
        intermediate_size=128 if smoke else 4864,
        num_hidden_layers=2 if smoke else 24,
        num_attention_heads=2 if smoke else 14,
        num_key_value_heads=1 if smoke else 2,
        vocab_size=512 if smoke else 151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.data.normal_(std=0.02)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.data.fill_(1.0)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@contextlib.contextmanager
def attention_time() -> Iterator[list[float]]:
    """Collects the seconds of each layer's append and attention while the block runs."""
    spent: list[float] = []
    stock = PackedForward.attend_rows

    def timed(self: PackedForward, *args: Any) -> Tensor:
        began = time.perf_counter()
        out = stock(self, *args)
        spent.append(time.perf_counter() - began)
        return out

    PackedForward.attend_rows = timed  # type: ignore[method-assign,assignment]
    try:
        yield spent
    finally:
        PackedForward.attend_rows = stock  # type: ignore[method-assign]


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token of generate() was chosen."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def _prompt(length: int, vocab: int) -> list[int]:
    return [(7919 * i + 13) % (vocab - 3) + 3 for i in range(length)]


def _steps(times: list[float]) -> list[float]:
    """Microseconds between neighbours; the first pay for new shapes."""
    return [1e6 * (b - a) for a, b in itertools.pairwise(times[1:])]


def ours(model: Any, threads: int, prefix: int, steps: int) -> Iterator[Figure]:
    """Prefill and steps of `apr.decode`, with the split of a step and the memory."""
    room = prefix + threads * (steps + 2 * 64) + 128
    with apr.Session(model, max_tokens=room) as session:
        root = session.thread(_prompt(prefix, session.spec.vocab_size))
        began = time.perf_counter()
        session.step([root])
        seconds = time.perf_counter() - began
        yield Figure(f"apr, prefill, {prefix} tokens", [1e6 * seconds])
        kids, at = root.fork(threads), [time.perf_counter()]
        before = session.stats
        with attention_time() as spent:
            apr.decode(
                session,
                kids,
                max_new_tokens=steps,
                on_step=lambda _: at.append(time.perf_counter()),
                **SAMPLING,
            )
        stats = session.stats
        whole = (at[-1] - at[0]) / steps
        choice = (stats.choice_seconds - before.choice_seconds) / steps
        forward = (stats.forward_seconds - before.forward_seconds) / steps
        attention = sum(spent) / steps
        token_bytes = session.spec.bytes_per_token
        floor = prefix + threads * (steps - 1)  # the last token is queued
        used = stats.used_pages * session.page_size
        parts = {
            "model": forward - attention,
            "attention": attention,
            "sampling": choice,
            "host": whole - forward - choice,
        }
        note = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in parts.items())
        median = float(np.median(_steps(at)))
        facts: dict[str, Any] = {
            **{f"{name}_ms": round(1e3 * s, 3) for name, s in parts.items()},
            "tokens_per_s": round(threads / median * 1e6, 1),
            "kv_mib": round(used * token_bytes / 2**20, 2),
            "kv_floor_mib": round(floor * token_bytes / 2**20, 2),
            "slots_beside_a_page_a_thread": used - floor - 64 * threads,
        }
        note += f"; KV {facts['kv_mib']} MiB, prefix + own {facts['kv_floor_mib']}"
        yield Figure(f"apr, step, {threads} x {prefix}", _steps(at), note, facts)


def stock(model: Any, threads: int, prefix: int, steps: int) -> Figure | None:
    """Steps of generate() on a batched cache, its prompt prefilled once and repeated."""
    if threads * (prefix + steps) > MOST_STOCK_TOKENS:
        return None
    ids = torch.tensor([_prompt(prefix, model.config.vocab_size)])
    with torch.no_grad():
        out = model(ids[:, :-1], use_cache=True, logits_to_keep=1)
    cache, clock = out.past_key_values, Clock()
    cache.batch_repeat_interleave(threads)
    model.generate(
        ids.expand(threads, -1),
        past_key_values=cache,
        max_new_tokens=steps,
        pad_token_id=0,
        stopping_criteria=[clock],
        **SAMPLING,
    )
    return Figure(f"generate, step, {threads} x {prefix}", _steps(clock.at))


@torch.no_grad()
def copies(model: Any, threads: int, prefix: int) -> Figure | None:
    """A step of a loop over branches, each with a deep copy of the cache."""
    if threads * prefix > MOST_STOCK_TOKENS:
        return None
    ids = torch.tensor([_prompt(prefix, model.config.vocab_size)])
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    branches = [copy.deepcopy(cache) for _ in range(threads)]
    times = []
    for step in range(4):
        began = time.perf_counter()
        for i, branch in enumerate(branches):
            logits = model(torch.tensor([[i + step + 3]]), past_key_values=branch).logits[:, -1]
            torch.multinomial((logits.float() / 0.8).softmax(-1), 1)
        times.append(1e6 * (time.perf_counter() - began))
    return Figure(f"a cache copied a branch, step, {threads} x {prefix}", times[1:])


def whole_runs(model: Any, threads: int, prefix: int, tokens: int, smoke: bool) -> Iterator[Figure]:
    """`threads` answers of `tokens` tokens to one prompt, prefill included, once each."""
    prompt = _prompt(prefix, model.config.vocab_size)

    def by_apr() -> None:
        room = prefix + threads * (tokens + 128) + 128
        with apr.Session(model, max_tokens=room) as session:
            kids = session.thread(prompt).fork(threads)
            apr.decode(session, kids, max_new_tokens=tokens, **SAMPLING)

    def by_generate() -> None:
        model.generate(
            torch.tensor([prompt]),
            num_return_sequences=threads,
            max_new_tokens=tokens,
            pad_token_id=0,
            **SAMPLING,
        )

    def by_generate_batch() -> None:
        config = GenerationConfig(max_new_tokens=tokens, pad_token_id=0, **SAMPLING)
        # By default it takes, and fills, most of the memory.
        small = ContinuousBatchingConfig(num_blocks=64) if smoke else None
        done = model.generate_batch(
            [prompt] * threads, generation_config=config, continuous_batching_config=small
        )
        assert len(done) == threads

    runs: dict[str, Callable[[], None]] = {
        "apr": by_apr,
        "generate": by_generate,
        "generate_batch": by_generate_batch,
    }
    first = 0.0
    for name, run in runs.items():
        began = time.perf_counter()
        try:
            run()
        except Exception as error:  # what does not run on this machine is told, and left out
            print(f"{name} does not run here: {type(error).__name__}: {str(error)[:150]}")
            continue
        seconds = time.perf_counter() - began
        first = first or seconds
        note = f"{threads * tokens / seconds:.0f} tokens/s, {seconds / first:.2f} x apr"
        title = f"{name}, {threads} answers of {tokens} to {prefix}, in whole"
        yield Figure(title, [1e6 * seconds], note)


class Hogwild:
    """A step of workers that see each other's tokens, as the method's first implementation has it
    (arXiv 2504.06261): for each worker the blocks of all are put together anew, with keys rotated
    to where they stand in its view.
    """

    def __init__(self, model: Any, workers: int, prefix: int, own: int) -> None:
        self._model, self._workers = model, workers
        ids = torch.tensor([_prompt(prefix, model.config.vocab_size)])
        past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self._prompt = [(layer.keys, layer.values) for layer in past.layers]
        self._own = [
            [
                (torch.randn_like(k[:, :, :1]).expand(-1, -1, own, -1).clone(), v[:, :, :own])
                for k, v in self._prompt
            ]
            for _ in range(workers)
        ]

    def _turn(self, keys: Tensor, by: int) -> Tensor:
        cos, sin = self._model.model.rotary_emb(keys, torch.tensor([[by]]))
        half = keys.shape[-1] // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], -1)
        rotated: Tensor = keys * cos + turned * sin
        return rotated

    @torch.no_grad()
    def step(self) -> None:
        """One token for each worker."""
        caches = []
        for worker in range(self._workers):
            order = [w for w in range(self._workers) if w != worker] + [worker]
            cache = DynamicCache()
            for layer, (k, v) in enumerate(self._prompt):
                keys, values, moved = [k], [v], 0
                for other in order:
                    own_k, own_v = self._own[other][layer]
                    keys.append(self._turn(own_k, moved))
                    values.append(own_v)
                    moved += own_k.shape[2]
                cache.update(torch.cat(keys, 2), torch.cat(values, 2), layer)
            caches.append(cache)
        batch = DynamicCache()
        for layer in range(len(self._prompt)):
            both = [(c.layers[layer].keys, c.layers[layer].values) for c in caches]
            batch.update(torch.cat([k for k, _ in both]), torch.cat([v for _, v in both]), layer)
        ids = torch.arange(3, 3 + self._workers)[:, None]
        self._model(ids, past_key_values=batch, use_cache=True)


def hogwild(model: Any, workers: int, prefix: int, own: int, steps: int) -> Iterator[Figure]:
    """Steps of workers that read each other's regions, and of the baseline."""
    with apr.Session(model, max_tokens=prefix + workers * (own + steps + 128) + 128) as session:
        prompt = session.segment(_prompt(prefix, session.spec.vocab_size))
        regions = [session.region(_prompt(own, 500), base=prefix) for _ in range(workers)]
        threads = [
            session.thread(view=[prompt, *(r for r in regions if r is not mine), mine], writes=mine)
            for mine in regions
        ]
        times = []
        for step in range(steps):
            for thread in threads:
                thread.extend([step + 3])
            began = time.perf_counter()
            session.step(threads)
            times.append(1e6 * (time.perf_counter() - began))
    yield Figure(f"apr, hogwild step, {workers} workers, {prefix} + {own} each", times[1:])
    baseline, times = Hogwild(model, workers, prefix, own), []
    for _ in range(4):
        began = time.perf_counter()
        baseline.step()
        times.append(1e6 * (time.perf_counter() - began))
    yield Figure(f"put together anew, {workers} workers, {prefix} + {own} each", times[1:])


def bench_loop(options: argparse.Namespace) -> Iterator[Figure]:
    """Everything, on the 0.5B shape with random weights, or on the model of a folder."""
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, trust_remote_code=False
        ).eval()
    else:
        model = half_billion(options.smoke)
    widths, lengths = ((1, 2), (64,)) if options.smoke else ((1, 4, 16, 64), (512, 2048, 8192))
    steps, tokens = (5, 4) if options.smoke else (24, ANSWER)
    for prefix in lengths:
        for threads in widths:
            step = 0.0
            for figure in ours(model, threads, prefix, steps):
                step = figure.median
                yield shown(figure)
            for other in (
                stock(model, threads, prefix, max(6, steps // 3)),
                copies(model, threads, prefix),
            ):
                if other is not None:
                    other.note = f"{other.median / step:.2f} x apr"
                    yield shown(other)
    for workers in (2,) if options.smoke else (2, 4, 8):
        if not options.model:  # a model with windows has other layers than the baseline knows
            sizes = (lengths[0], 16, 5) if options.smoke else (512, 256, 16)
            yield from map(shown, hogwild(model, workers, *sizes))
    middle = lengths[len(lengths) // 2]
    width = widths[-1 if options.smoke else 2]
    yield from map(shown, whole_runs(model, width, middle, tokens, options.smoke))


def shown(figure: Figure) -> Figure:
    print(figure.line(), flush=True)
    return figure
