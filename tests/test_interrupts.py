"""Ctrl-C at every line of a cached forward in turn: model, cache and session go on as if it had not
begun, or as if it had ended.
"""

from __future__ import annotations

import sys
from linecache import getline
from pathlib import Path

import pytest
import torch

import apr
from apr.hf import interface
from models import CLOSE, build, distance, stock, tokens

WATCHED = ("cache/cache.py", "cache/call.py", "cache/forward.py", "hf/interface.py")
PACKAGE = str(Path(apr.__file__).parent)
PROMPT = tokens(9)


class Interrupt:
    """Raises at the n-th line that is run of the watched files."""

    def __init__(self, n):
        self.left, self.where = n, None

    def __call__(self, frame, event, _):
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE) or not path.endswith(WATCHED):
            return None
        # What puts things right is not interrupted again, and a lock's own lines are not ours.
        if frame.f_code.co_name in ("take_back", "__exit__", "off", "stop", "_end", "__del__"):
            return None
        if event == "line" and not getline(path, frame.f_lineno).lstrip().startswith("with "):
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(path).name}:{frame.f_lineno}"
                raise KeyboardInterrupt(self.where)
        return self


def interrupted(call, n):
    """Where a call was interrupted at its n-th line, or None where it ended first."""
    trace = Interrupt(n)
    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(former)
    return trace.where


def still_right(model, cache, before, new):
    """The state is that of before the call, or of after it, and everything can be used."""
    assert distance(stock(model, PROMPT), before) == 0.0
    assert model.config._attn_implementation == "sdpa" and not interface._FORMER
    texts = [thread.tokens for thread in cache.threads]
    assert texts in ([], [PROMPT] * len(texts), [[*PROMPT, *new]] * len(texts)), texts
    assert cache.get_seq_length() == (len(texts[0]) if texts else 0)
    assert cache.session.stats.threads == len(texts)
    with torch.no_grad():
        ids = torch.tensor([[5]] * (len(texts) or 2))
        logits = model(ids, past_key_values=cache).logits[:, -1]
    for row, text in zip(logits, texts or [[], []], strict=True):
        assert distance(row, stock(model, [*text, 5])[-1]) < CLOSE


@pytest.mark.parametrize("what", ["first call", "further call", "shorter prompt"])
def test_at_every_line(what):
    model = build("llama")
    before, seen = stock(model, PROMPT), set()
    new = tokens(3, 4) if what == "further call" else []
    n = 0
    while True:
        n += 1
        cache = apr.Cache(model, max_tokens=512, page_size=16)
        first = torch.tensor([PROMPT, PROMPT])
        with torch.no_grad():
            if what != "first call":
                model(first, past_key_values=cache)
                ids = torch.tensor([new, new] if new else [PROMPT, PROMPT])
                cache._is_user_defined = not new  # as a generate() begins
            else:
                ids = first
            positions = None if new else torch.arange(9)[None]
            where = interrupted(
                lambda ids=ids, positions=positions, cache=cache: model(
                    ids, position_ids=positions, logits_to_keep=1, past_key_values=cache
                ),
                n,
            )
            if where is None:
                break
            seen.add(where)
            still_right(model, cache, before, new)
        cache.close()
    cache.close()
    assert len(seen) > 100  # the lines were really run
