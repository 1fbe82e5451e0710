"""What `apr` makes of one architecture, each answer against the stock model's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import GenerationConfig

import apr

EXACT = 2e-3  # of the standard deviation of the stock logits; float32 gives about 1e-6
FORKS = (9, 6, 5)  # tokens of three children, run in these parts:
PARTS = ((3, 1, 4), (5, 4, 1))


def tokens(n: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist()
    return ids


class Stock:
    """The model by itself, asked before apr touches it."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.prompt = model, tokens(length, 0)
        self.tails = [tokens(n, i + 1) for i, n in enumerate(FORKS)]
        self.rows = [self.logits(self.prompt + tail) for tail in self.tails]
        self.scale = float(self.rows[0].std().clamp_min(1e-9))
        self.stood = self.implementations()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        out = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        if out.shape[0] != len(ids):
            raise RuntimeError(f"stock logits have the shape {list(out.shape)}")
        logits: Tensor = out.float()
        return logits

    def off(self, got: Tensor, want: Tensor) -> float:
        return float((got.float() - want).abs().max()) / self.scale

    def implementations(self) -> list[str]:
        configs = (getattr(m, "config", None) for m in self.model.modules())
        return [str(getattr(c, "_attn_implementation", None)) for c in configs]

    def generated(self, cache: Any = None, **options: Any) -> list[list[int]]:
        settings = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
        ids = torch.tensor([self.prompt])
        if cache is not None:
            options["past_key_values"] = cache
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings,
            max_new_tokens=8, do_sample=False, **options,
        )  # fmt: skip
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows


def fork(session: apr.Session, stock: Stock) -> float:
    """Ragged children in packed steps, of several tokens and of one."""
    root = session.thread(stock.prompt)
    kids, at, worst = root.fork(3), [0, 0, 0], 0.0
    for counts in PARTS:
        for i, kid in enumerate(kids):
            kid.extend(stock.tails[i][at[i] : at[i] + counts[i]])
            at[i] += counts[i]
        for i, got in enumerate(session.step(kids)):
            worst = max(worst, stock.off(got, stock.rows[i][len(stock.prompt) + at[i] - 1]))
    for thread in (*kids, root):
        thread.release()
    return worst


def trim(session: apr.Session, stock: Stock) -> float:
    """Back into the prompt, and on with another text."""
    thread = session.thread(stock.prompt + stock.tails[1])
    session.step([thread])
    keep = len(stock.prompt)
    thread.trim(keep)
    thread.extend(stock.tails[0][:2])
    worst = stock.off(session.step([thread])[0], stock.rows[0][keep + 1])
    thread.extend(stock.tails[0][2:])
    worst = max(worst, stock.off(session.step([thread])[0], stock.rows[0][-1]))
    thread.release()
    return worst


def reencode(session: apr.Session, stock: Stock) -> float:
    root = session.thread(stock.prompt)
    kids = root.fork(2)
    for kid, tail in zip(kids, stock.tails, strict=False):
        kid.extend(tail)
    session.step(kids)
    root.join(kids, reencode=True)
    want = stock.logits(stock.prompt + stock.tails[0] + stock.tails[1])[-1]
    error = stock.off(session.step([root])[0], want)
    root.release()
    return error


def reread(session: apr.Session, stock: Stock) -> float | None:
    """A segment read 30 positions from where it was written."""
    if not session.spec.can_rotate:
        return None
    start = len(stock.prompt)
    head, tail = session.segment(stock.prompt), session.region(base=start + 30)
    thread = session.thread(view=[(head, 0), (tail, start)], writes=tail)
    thread.extend(stock.tails[0])
    error = stock.off(session.step([thread])[0], stock.rows[0][-1])
    thread.release()
    return error


def generate(model: Any, stock: Stock) -> float | None:
    """generate() with apr.Cache, greedy and with beams: 0 where the tokens are stock's."""
    if not model.can_generate():
        return None
    off = 0.0
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        try:
            want = stock.generated(**options)
        except Exception:  # stock itself cannot
            return None
        try:
            cache = apr.Cache(model, max_tokens=4096)
        except apr.UnsupportedModel:
            return None  # it says so
        got = stock.generated(cache, **options)
        cache.close()
        # Some models' own cache changes what they say; without it they are themselves.
        if got != want and got != stock.generated(use_cache=False, **options):
            off = 1.0
    return off


def half(name: str, std: float | None, length: int) -> list[float | str]:
    """In bfloat16: [how far forks are from stock, and stock from its float32], or why not."""
    model = tiny.build(name, std).to(torch.bfloat16)
    try:
        stock = Stock(model, length)
    except Exception as error:
        return [f"stock: {type(error).__name__}: {error}"[:200]]
    try:
        with apr.Session(model, max_tokens=4096) as session:
            error = fork(session, stock)
    except apr.Error as refused:
        return [f"{type(refused).__name__}: {refused}"[:200]]
    model.float()
    exact = [stock.logits(stock.prompt + tail) for tail in stock.tails]
    noise = max(stock.off(x, y) for x, y in zip(stock.rows, exact, strict=True))
    return [round(error, 4), round(noise, 4)]


def is_close(pair: list[Any]) -> bool:
    if len(pair) == 1:
        return str(pair[0]).startswith("stock: ")  # the stock model itself does not run
    return bool(pair[0] <= max(0.05, 3 * pair[1]))


def kind_of(spec: Any) -> str:
    if spec.states is None:
        return "plan"
    return "plan and states" if spec.states.attends else "rows"


def examine(name: str, seed: int = 1) -> dict[str, Any]:
    """A record: how the architecture runs, what is wrong, what it costs."""
    record: dict[str, Any] = {"name": name}
    try:
        model = tiny.build(name, seed=seed)
        length = 70
        stock = Stock(model, length)
    except Exception as error:
        return record | {"how": "not built", "why": f"{type(error).__name__}: {error}"[:160]}
    try:
        session = apr.Session(model, max_tokens=4096)
    except apr.Error as error:
        return record | {"how": "refused", "why": str(error)}
    with session:
        spec = session.spec
        record |= {"how": kind_of(spec), "token_bytes": spec.bytes_per_token}
        if spec.states is not None:
            record["why"] = spec.states.reason
            if spec.states.chooses:
                # It is exact for as many tokens as it keeps, 16 here.
                record["note"] = "while its index leaves no token out"
                length = 1
                stock = Stock(model, length)
        if spec.layers and not spec.can_rotate and spec.states is None:
            record["note"] = "positions are not turned"
        elif any(layer.latent is not None for layer in spec.layers):
            record["note"] = "keeps latents"
        _check(record, session, stock)
    checks: dict[str, Callable[[], Any]] = {
        "generate": lambda: generate(model, stock),
        "given back": lambda: float(stock.implementations() != stock.stood),
        "as before": lambda: stock.off(stock.logits(stock.prompt + stock.tails[0]), stock.rows[0]),
    }
    for check, run in checks.items():
        _run(record, check, run)
    if "," in name:  # a variant: in float32 alone
        return record
    for what, std in (("bfloat16", 0.15), ("bfloat16, initial weights", None)):
        _run(record, what, lambda std=std: half(name, std, length))
    return record


def _check(record: dict[str, Any], session: apr.Session, stock: Stock) -> None:
    for check in (fork, trim, reencode, reread):
        _run(record, check.__name__, lambda check=check: check(session, stock))
    if session.spec.states is not None:
        thread = session.thread(stock.prompt)
        session.step([thread])
        record["state_bytes"] = session.stats.state_bytes
        thread.release()


def _run(record: dict[str, Any], name: str, run: Callable[[], Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record[name] = run()
    except Exception as error:
        record[name] = f"{type(error).__name__}: {error}"[:200]


CHECKS = ("fork", "trim", "reencode", "reread", "generate", "given back", "as before")
HALF = ("bfloat16", "bfloat16, initial weights")


def faults(record: dict[str, Any]) -> list[str]:
    """The checks that failed, with what they said."""
    found = []
    for name in CHECKS:
        value = record.get(name)
        if isinstance(value, str) or (isinstance(value, float) and not value <= EXACT):
            found.append(f"{name}: {value}")
    for name in HALF:
        value = record.get(name)
        if isinstance(value, str) or (isinstance(value, list) and not is_close(value)):
            found.append(f"{name}: {value}")
    if "stopped" in record:
        found.append(record["stopped"])
    return found


def examine_twice(name: str) -> dict[str, Any]:
    """An expert that is chosen by a hair flips with the last bit: what is wrong must be wrong with
    other weights too.
    """
    record = examine(name)
    return examine(name, seed=2) if faults(record) else record
