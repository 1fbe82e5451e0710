"""What a step costs on several ranks: a model of it, from measured parts, beside measured steps.

    step = weights / ranks * read(rows) + attention / ranks + exchanges of the layers
           + logits gathered + what ranks compare + the rest

Under torchrun it has as many ranks as that started; then it foretells other machines, from figures
that are named as assumptions and were not measured here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import apr
from apr.bench.harness import Figure
from apr.hf.world import is_first_rank, num_ranks, same_everywhere

LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
SMOKE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Shape:
    """Of a model: bytes are those of one number."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes: int

    @property
    def weights(self) -> int:
        """Bytes that a step reads; the embeddings are looked up, not read."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.ffn
        return self.bytes * (self.layers * layer + self.hidden * self.vocab)

    @property
    def kv(self) -> int:
        """Bytes of keys and values of one token."""
        return self.bytes * 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Link:
    """Between ranks: seconds of the least exchange, and bytes a second."""

    least: float
    rate: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of a ring: each rank sends 2 (ranks - 1) / ranks of it."""
        return 0.0 if ranks == 1 else self.least + 2 * (ranks - 1) / ranks * size / self.rate

    def all_gather(self, size: float, ranks: int) -> float:
        return 0.0 if ranks == 1 else self.least + (ranks - 1) / ranks * size / self.rate


@dataclass(frozen=True)
class Machine:
    """One rank's own: bytes of weights a second with so many rows, bytes of keys and values a
    second, seconds of a step that go to neither.
    """

    weights: Callable[[int], float]
    kv: float
    rest: float


def step_seconds(
    shape: Shape, machine: Machine, link: Link, ranks: int, threads: int, prefix: int, own: int
) -> float:
    """A step of `threads` threads behind a shared prefix, each with `own` tokens of its own."""
    rows = threads * shape.hidden * shape.bytes
    exchanges = (2 * shape.layers + 1) * link.all_reduce(rows, ranks)
    gathered = link.all_gather(threads * shape.vocab * shape.bytes, ranks)
    compared = 2 * link.all_gather(64 * ranks, ranks)
    read = shape.weights / ranks / machine.weights(threads)
    attended = (prefix + threads * own) * shape.kv / ranks / machine.kv
    return read + attended + exchanges + gathered + compared + machine.rest


def memory_bytes(shape: Shape, ranks: int, threads: int, prefix: int, own: int) -> float:
    """Of one rank: its part of the weights, and of keys and values."""
    embedding = shape.hidden * shape.vocab * shape.bytes
    return (shape.weights + embedding + (prefix + threads * own) * shape.kv) / ranks


# ---- measured here -----------------------------------------------------------------------------


def _median(action: Callable[[], Any], rounds: int) -> float:
    action()
    times = []
    for _ in range(rounds):
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return median(times)


def _measured_link(shape: Shape, rounds: int) -> Link:
    """Exchanges as a step has them: each waits for the slower of the ranks' products."""
    ranks = num_ranks()
    if ranks == 1:
        return Link(0.0, 1.0)
    weights = [torch.randn(shape.ffn, shape.hidden) for _ in range(3 * shape.layers)]
    x, small, large = torch.randn(1, shape.hidden), torch.zeros(16), torch.randn(1 << 20)

    def products(exchanged: bool) -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)
            if exchanged:
                dist.all_reduce(small)

    apart = _median(lambda: products(False), rounds)
    least = max(_median(lambda: products(True), rounds) - apart, 1e-9) / len(weights)
    whole = _median(lambda: dist.all_reduce(large), rounds)
    sent = 2 * (ranks - 1) / ranks * large.numel() * large.element_size()
    return Link(least, sent / max(whole - least, 1e-9))


def _weight_rate(shape: Shape, width: int, rounds: int) -> float:
    """Bytes a second of products with `width` rows, over more weights than a cache holds."""
    weights = [torch.randn(shape.ffn, shape.hidden) for _ in range(3 * shape.layers)]
    x = torch.randn(width, shape.hidden)
    spent = _median(lambda: [torch.nn.functional.linear(x, w) for w in weights], rounds)
    return sum(w.numel() * w.element_size() for w in weights) / spent


def _step(session: apr.Session, threads: int, prefix: int, rounds: int) -> Figure:
    root = session.thread([(7 * i + 3) % session.spec.vocab_size for i in range(prefix)])
    session.step([root])
    kids = root.fork(threads)
    times = []
    for turn in range(rounds + 2):
        for i, kid in enumerate(kids):
            kid.extend([(31 * i + turn) % session.spec.vocab_size])
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        session.step(kids)
        times.append((time.perf_counter() - began) * 1e6)
    for thread in (root, *kids):
        thread.release()
    return Figure(f"{session.ranks.size} ranks, {threads} threads, prefix {prefix}", times[2:])


def _measured_machine(
    shape: Shape, session: apr.Session, widths: Sequence[int], prefixes: Sequence[int], rounds: int
) -> Machine:
    """Rates of products; keys and values, and the rest, from two steps of one thread."""
    rates = {width: _weight_rate(shape, width, rounds) for width in widths}
    short, long = (_step(session, 1, prefix, rounds).median / 1e6 for prefix in prefixes)
    kv = (prefixes[1] - prefixes[0]) * shape.kv / max(long - short, 1e-6)
    rest = short - shape.weights / rates[widths[0]] - prefixes[0] * shape.kv / kv
    return Machine(rates.__getitem__, kv, rest)


def bench_ranks(options: argparse.Namespace) -> Iterator[Figure]:
    """Steps on one rank and, under torchrun, on all, beside what the model of a step foretells."""
    torch.manual_seed(0)
    rounds = 20
    widths, prefixes = (1, 4, 16), (64, options.prefix)
    config = LlamaConfig(**(SMOKE if options.smoke else LARGE), **HEADS, vocab_size=16384)
    whole = LlamaForCausalLM(config).eval()
    shape = Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        4,
    )
    link, ranks = _measured_link(shape, rounds), num_ranks()
    most = 2 * options.prefix + 4096
    with tempfile.TemporaryDirectory() as own, apr.Session(whole, most) as session:
        machine = _measured_machine(shape, session, widths, prefixes, rounds)
        print(_described(machine, link, widths, ranks))
        sessions = [session]
        if ranks > 1:
            folder = same_everywhere(own)
            if is_first_rank():
                whole.save_pretrained(folder)
            dist.barrier()
            shared = DistributedConfig(tp_size=ranks)
            part = AutoModelForCausalLM.from_pretrained(folder, distributed_config=shared)
            sessions.append(apr.Session(part.eval(), most))
        for threads in widths:
            for prefix in prefixes:
                for one in sessions:
                    found = _step(one, threads, prefix, rounds)
                    size = one.ranks.size
                    told = 1e6 * step_seconds(
                        shape, machine, link, size, threads, prefix, rounds // 2
                    )
                    found.note = f"foretold {told:.0f} us, {told / found.median:.2f} of it"
                    found.facts = {"foretold_us": round(told, 1), "ranks": size}
                    print(found.line())
                    yield found
        for one in sessions[1:]:
            one.close()
    print(_elsewhere())


def _described(machine: Machine, link: Link, widths: Sequence[int], ranks: int) -> str:
    rates = ", ".join(f"{machine.weights(n) / 1e9:.1f} at {n}" for n in widths)
    between = f"; exchanges {link.least * 1e6:.0f} us, {link.rate / 1e9:.2f} GB/s"
    return (
        f"{ranks} ranks; weights GB/s by rows: {rates}; keys and values {machine.kv / 1e9:.1f} "
        f"GB/s; the rest {machine.rest * 1e3:.2f} ms" + (between if ranks > 1 else "")
    )


# ---- foretold for other machines ---------------------------------------------------------------

LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128, 128256, 2)
# Assumed, not measured: 80 % of an H200's 4.8 TB/s for both; 1 ms of a step that no GPU shortens;
# NCCL's least exchange, and rates, of NVLink in one machine and of 400 Gb/s Infiniband between two.
H200 = Machine(lambda rows: 0.8 * 4.8e12, 0.8 * 4.8e12, 1e-3)
NVLINK, INFINIBAND = Link(12e-6, 300e9), Link(30e-6, 40e9)


def _elsewhere() -> str:
    """A table of estimates."""
    rows = [
        "\nEstimates, none of them measured: Llama 3.1 70B, bfloat16, on H200s; 80 % of 4.8 TB/s,\n"
        "1 ms of host, exchanges of 12 us and 300 GB/s in a machine, 30 us and 40 GB/s between two",
        " ranks  threads  prefix  ms a step  of it exchanges  GB a rank",
    ]
    for ranks in (2, 4, 8, 16):
        link = NVLINK if ranks <= 8 else INFINIBAND
        for threads in (1, 16, 64):
            work = (ranks, threads, 8192, 512)
            total = step_seconds(LLAMA_70B, H200, link, *work)
            alone = step_seconds(LLAMA_70B, H200, Link(0.0, float("inf")), *work)
            held = memory_bytes(LLAMA_70B, *work) / 1e9
            part = f"{(total - alone) / total:.0%}"
            rows.append(f"{ranks:6}{threads:9}{8192:8}{total * 1e3:11.1f}{part:>17}{held:11.0f}")
    return "\n".join(rows)
