"""Models that torch.compile has, before or after apr."""

from __future__ import annotations

import pytest
import torch

import apr
from models import CLOSE, build, distance, stock
from test_beside import IDS, PROMPT, generated


@pytest.mark.parametrize("how", ["forward", "method", "module", "base"])
def test_compiled_models(how):
    torch._dynamo.reset()
    model = build("llama")
    want, text = stock(model, [*PROMPT, 7])[-1], generated(model)
    compiled = compile_(model, how)
    with apr.Session(compiled, max_tokens=512) as s:
        thread = s.thread(PROMPT)
        s.step([thread])
        kids = thread.fork(3)
        for kid in kids:
            kid.extend([7])
        assert distance(s.step(kids)[2], want) < CLOSE
    cache = apr.Cache(compiled, max_tokens=512)
    assert torch.equal(generated(compiled, cache), text)
    assert len(cache.threads[0]) == len(PROMPT) + 5
    cache.close()
    assert torch.equal(generated(compiled), text)


def test_a_model_that_was_wrapped_by_compile_runs_compiled_in_a_session(monkeypatch):
    compiled, calls = compile_(build("llama"), "module"), []
    stock_call = type(compiled).__call__

    def counted(self, *args, **kwargs):
        calls.append(1)
        return stock_call(self, *args, **kwargs)

    monkeypatch.setattr(type(compiled), "__call__", counted)
    with apr.Session(compiled, max_tokens=512, self_test=False) as s:
        calls.clear()
        s.step([s.thread(PROMPT)])
    assert calls == [1]


def compile_(model, how, **options):
    options = {"backend": "eager", **options}
    if how == "forward":
        model.forward = torch.compile(model.forward, **options)
    elif how == "method":
        model.compile(**options)
    elif how == "base":
        model.model = torch.compile(model.model, **options)
    else:
        return torch.compile(model, **options)
    return model


def test_fullgraph_decodes_and_own_fullgraph_calls_stay_whole():
    torch._dynamo.reset()
    model = build("llama")
    text, want = generated(model), stock(model, PROMPT)
    s = apr.Session(model, max_tokens=512)
    cache = apr.Cache(model, max_tokens=512)
    compile_(model, "forward", fullgraph=True)
    assert distance(s.step([s.thread(PROMPT)])[0], want[-1]) < CLOSE
    assert torch.equal(generated(model, cache), text)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert distance(whole(IDS, use_cache=False).logits[0], want) < CLOSE
    s.close()
    cache.close()
