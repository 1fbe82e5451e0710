"""Files of tokens alone (`keys=False`): what they are made of is run again."""

from __future__ import annotations

import pytest
import torch

import apr
from conftest import built
from models import CLOSE, distance, stock, tokens
from test_saving import SAMPLED, SIZES


def lines(s):
    """A tree of lines: a long prefix, forks of forks, short heads that were copied, a trim, and
    tokens that have not run.
    """
    root = s.thread(tokens(40))
    kids = root.fork(3)
    apr.decode(s, kids, **{**SAMPLED, "max_new_tokens": 3})
    grandchild = kids[1].fork()[0]
    apr.decode(s, [grandchild], **{**SAMPLED, "max_new_tokens": 2})
    kids[2].trim(41)
    root.join(kids[:1], reencode=True)
    root.extend([7, 8])
    other = s.thread(tokens(9, 4))
    s.step([other])
    return {"root": root, "kid": kids[1], "cut": kids[2], "deep": grandchild, "other": other}


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "lfm2", "falcon_h1", "mamba", "bloom"])
@pytest.mark.filterwarnings("ignore:.*runs by rows:UserWarning")
def test_tokens_alone(name, tmp_path):
    """What is not in the file is run again when it is opened, or, of states, by the next step."""
    model = built(name)
    with apr.Session(model, **SIZES, page_size=16, seed=5) as s:
        named = lines(s)
        s.save(tmp_path / "tree", named, keys=False)
        texts = {name: thread.tokens for name, thread in named.items()}
        queued = {name: thread.queued for name, thread in named.items()}
        want = [o.tokens for o in apr.decode(s, list(named.values()), **SAMPLED)]
    opened, saved = apr.Session.open(tmp_path / "tree", model, **SIZES)
    found = {name: saved[name] for name in named}
    with opened as s:
        assert {name: thread.tokens for name, thread in found.items()} == texts
        assert {name: thread.queued for name, thread in found.items()} == queued
        stored = s.stats.stored_tokens
        assert [o.tokens for o in apr.decode(s, list(found.values()), **SAMPLED)] == want
        for thread in found.values():
            thread.extend([5])
        for thread, logits in zip(found.values(), s.step(list(found.values())), strict=True):
            assert distance(logits, stock(model, thread.tokens)[-1]) < 5 * CLOSE
        s.check()
        assert stored < sum(map(len, texts.values()))  # what they share lies there once
        found["kid"].join([found["deep"]], reencode=True)
        s.step([found["kid"]])


def test_tokens_are_saved_of_a_pool_that_was_too_small(llama, tmp_path):
    """Without keys nothing has to come back for it."""
    with apr.Session(llama, 256, page_size=16, on_full="offload") as s:
        threads = {str(i): s.thread(tokens(91, i)) for i in range(4)}
        for thread in threads.values():
            s.step([thread])
        s.save(tmp_path / "file", threads, keys=False)
    opened, found = apr.Session.open(tmp_path / "file", llama, **SIZES)
    with opened as s:
        for i, thread in found.items():
            assert thread.tokens == tokens(91, int(i))
            thread.extend([5])
            assert distance(s.step([thread])[0], stock(llama, thread.tokens)[-1]) < CLOSE


def test_keys_that_tokens_do_not_tell_are_refused(llama, tmp_path):
    """Vectors and embeddings, also of threads that have none themselves; a file remembers it."""
    size = (2, llama.config.num_key_value_heads, llama.config.hidden_size // 4)
    with apr.Session(llama, **SIZES) as s:
        thread = s.thread(tokens(20))
        thread.vectors = apr.PathVectors(torch.randn(size), torch.randn(size))
        s.step([thread])
        (kid,) = thread.fork(1)
        with pytest.raises(apr.InvalidInput, match="do not tell"):
            s.save(tmp_path / "file", {"kid": kid}, keys=False)
        s.save(tmp_path / "file", {"kid": kid})
    opened, found = apr.Session.open(tmp_path / "file", llama, **SIZES)
    with opened as s, pytest.raises(apr.InvalidInput, match="do not tell"):
        s.save(tmp_path / "other", found, keys=False)
    cache = apr.Cache(llama, **SIZES)
    llama(inputs_embeds=torch.randn(1, 5, llama.config.hidden_size), past_key_values=cache)
    with pytest.raises(apr.InvalidInput, match="do not tell"):
        cache.session.save(tmp_path / "other", {"row": cache.threads[0]}, keys=False)
    cache.close()


def test_a_fork_whose_queued_tokens_another_view_made_is_no_line(llama):
    with apr.Session(llama, **SIZES) as s:
        parent = s.thread(tokens(20))
        s.step([parent])
        parent.extend(tokens(6, 1))
        before, waits = parent.fork(2)
        before.trim(20)
        parent.view = [s.segment([4, 5, 6]), *parent.view]
        waits.extend([8])
        assert not waits.is_line and before.is_line


def test_a_file_of_tokens_is_small(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s:
        kids = s.thread(tokens(1000)).fork(2)
        s.step(kids)
        for keys in (True, False):
            s.save(tmp_path / f"{keys}", {"a": kids[0], "b": kids[1]}, keys=keys)
        held = s.stats.used_pages * s.page_size * s.spec.bytes_per_token
    sizes = [(tmp_path / f"{keys}").stat().st_size for keys in (True, False)]
    assert sizes[0] > held and sizes[1] < 32 * 1000


def test_what_tokens_do_not_tell_is_refused(llama, tmp_path):
    with apr.Session(llama, **SIZES) as s:
        joined, dropped = s.thread(tokens(20)), s.thread(tokens(20))
        joined.join(joined.fork(2))
        s.step([dropped])
        dropped.drop(4, 9)
        for one in (joined, dropped, s.segment(tokens(5)), s.thread([3], view=[s.segment([4])])):
            with pytest.raises(apr.InvalidInput, match="keys=False"):
                s.save(tmp_path / "file", {"x": one}, keys=False)
    hybrid = apr.Session(built("lfm2"), **SIZES)
    with hybrid as s, pytest.raises(apr.UnsupportedModel, match="keys=False"):
        s.save(tmp_path / "file", {"x": s.thread(tokens(5))})
    assert not list(tmp_path.iterdir())
