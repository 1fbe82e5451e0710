"""What an engine is in the place of a session: its threads, its tasks, what it refuses."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

import apr
from apr import remote
from served import GREEDY, PROMPT
from test_ranks import saved


def test_threads_may_be_changed_between_steps(serve, tok):
    """What is put in is read by the next token, as on a session."""
    server = serve(script=lambda text: "abcdef" if text.endswith("?") else "later")
    with remote.Engine(server.url, "m") as engine:
        thread = engine.thread(tok(PROMPT).input_ids)
        with apr.stream(engine, [thread], tokenizer=tok, max_new_tokens=9) as run:
            next(iter(run))
            thread.extend(tok("!").input_ids)
            for _ in run:
                pass
        assert tok.decode(thread.own_tokens) == PROMPT + "a!later<eos>"
        kid = engine.thread(tok(PROMPT).input_ids)
        with apr.stream(engine, [kid], tokenizer=tok, max_new_tokens=9) as run:
            next(iter(run))
            kid.trim(len(kid) - 1)
            kid.extend(tok("z").input_ids)  # another token in place of the first
            for _ in run:
                pass
        assert tok.decode(kid.own_tokens) == PROMPT + "zlater<eos>"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"logits_processor": [len]}, "takes none"),
        ({"prefix_allowed_tokens_fn": len}, "no processors"),
        ({"top_k": 5}, "top_k"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"num_beams": 2}, "num_beams"),
        ({"tempratur": 2}, "tempratur"),
        ({"n": "auto"}, "logits"),
    ],
)
def test_what_a_server_cannot_do_is_refused(serve, tok, options, said):
    server = serve("none")
    with remote.Engine(server.url, "m") as engine:
        with pytest.raises(apr.Error, match=said):
            apr.majority_vote(engine, tok, PROMPT, extract=len, **options)
        assert not any(asked.get("stream") for asked in server.requests)


@pytest.mark.parametrize(
    "method, options",
    [
        (apr.hogwild, {}),
        (apr.group_think, {}),
        (apr.parathinker, {}),
        (apr.beam_search, {"num_beams": 2}),
        (apr.branching_vote, {"extract": len}),
    ],
)
def test_methods_that_need_keys_or_logits_say_so(serve, tok, method, options):
    with remote.Engine(serve().url, "m") as engine:
        with pytest.raises(apr.UnsupportedModel, match="a served engine"):
            method(engine, tok, PROMPT, max_new_tokens=4, **options)
        assert engine.table.ask().num_threads == 0


def test_threads_of_an_engine(serve, tok):
    with remote.Engine(serve().url, "m") as engine:
        root = engine.thread(tok(PROMPT).input_ids)
        assert len(root.fork(5000)) == 5000  # there are no pages that they could fill
        kids = root.fork(2)
        kids[0].extend([7, 8])
        root.join([kids[0]], reencode=True)
        assert root.tokens == [*tok(PROMPT).input_ids, 7, 8]
        with pytest.raises(apr.UnsupportedModel, match="reencode"):
            root.join([kids[1]])
        whole = kids[1].tokens
        kids[1].drop(1, 3)  # of text alone: its server will run what is left
        assert kids[1].tokens == [whole[0], *whole[3:]] and root.tokens[:3] == whole[:3]
        for call in (engine.segment, engine.region):
            with pytest.raises(apr.UnsupportedModel):
                call([1])
    for wrong in ({"concurrency": 0}, {"retries": -1}, {"timeout": 0}, {"seed": 1.5}):
        with pytest.raises(apr.InvalidInput, match=next(iter(wrong))):
            remote.Engine("http://127.0.0.1:9/v1", "m", **wrong)


def test_a_task_may_stop_and_go_on(serve, tok):
    """Another loop over the same run takes up where the last one stopped, at once."""
    server = serve(pause=0.05)

    async def main(engine):
        thread = engine.thread(tok(PROMPT).input_ids)
        with apr.stream(engine, [thread], tokenizer=tok, max_new_tokens=14) as run:
            async for step in run:
                if step.tokens:
                    break
            times = [time.monotonic()]
            async for _ in run:
                times.append(time.monotonic())
            return len(thread), times[1] - times[0]

    with remote.Engine(server.url, "m") as engine:
        length, seconds = asyncio.run(main(engine))
    assert length > len(tok(PROMPT).input_ids) + 1 and seconds < 0.9  # a silent step is a second


def test_a_run_has_one_reader(serve, tok):
    server = serve(pause=0.1)

    async def read(run):
        async for _ in run:
            pass

    async def main(engine):
        thread = engine.thread(tok(PROMPT).input_ids)
        with apr.stream(engine, [thread], tokenizer=tok, max_new_tokens=30) as run:
            return await asyncio.gather(read(run), read(run), return_exceptions=True)

    with remote.Engine(server.url, "m") as engine:
        first, second = asyncio.run(main(engine))
    assert isinstance(first, apr.InvalidInput) and second is None


def test_tasks_of_a_fast_server_let_others_run(serve, tok):
    async def write(engine):
        threads = [engine.thread(tok(f"How far is {i}?").input_ids) for i in range(3)]
        async for _ in apr.astream(engine, threads, tokenizer=tok, max_new_tokens=200):
            time.sleep(0.005)  # more than the server takes

    async def main(engine):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(write(engine), 0.3)

    with remote.Engine(serve().url, "m") as engine:
        apr.stream(engine, [], tokenizer=tok)  # asks
        begun = time.monotonic()
        asyncio.run(main(engine))
        assert time.monotonic() - begun < 2  # all of it takes three seconds and more


def test_a_server_is_asked_once_by_many_tasks(serve, tok):
    server = serve()

    async def write(engine):
        thread = engine.thread(tok(PROMPT).input_ids)
        async for _ in apr.astream(engine, [thread], tokenizer=tok, **GREEDY):
            pass

    async def main(engine):
        await asyncio.gather(*(write(engine) for _ in range(12)))

    engine = remote.Engine(server.url, "m")
    asyncio.run(main(engine))
    assert len(server.requests) == 12 + 1
    thread = engine.thread(tok(PROMPT).input_ids)
    engine.close()
    with pytest.raises(apr.InvalidInput, match="closed"):
        asyncio.run(anext(apr.astream(engine, [thread], tokenizer=tok)))


def test_inside_a_running_loop(serve, tok):
    """As in a notebook: the engine has a loop of its own."""
    url = serve().url

    async def ask():
        with remote.Engine(url, "m") as engine:
            return apr.majority_vote(engine, tok, PROMPT, n=2, extract=len, **GREEDY)

    assert len(asyncio.run(ask()).threads) == 2


def test_the_program_of_the_page(serve, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    block = re.findall(r"<!-- needs a server -->\n```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my-model").mkdir()
    saved(tmp_path / "my-model", 2)
    monkeypatch.chdir(tmp_path)
    server = serve()
    exec(block[0].replace("http://127.0.0.1:8000/v1", server.url).replace("=200", "=20"), {})
    assert sum(bool(asked.get("stream")) for asked in server.requests) == 16


def test_tasks_wait_for_their_own_tokens(serve, local, tok):
    """Requests of all tasks run at once, and the event loop goes on meanwhile."""
    server, prompts = serve(pause=0.02), [f"How far is {i}?" for i in range(3)]

    async def write(engine, prompt, **options):
        thread = engine.thread(tok(prompt).input_ids)
        run = apr.astream(engine, [thread], tokenizer=tok, **{**GREEDY, **options})
        return [step.tokens[thread] async for step in run if step.tokens]

    async def main(engine):
        turns = 0

        async def turn():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        turning = asyncio.create_task(turn())
        found = await asyncio.gather(*(write(engine, prompt) for prompt in prompts))
        assert turns > 50 and server.most == 3
        late = asyncio.create_task(write(engine, PROMPT, max_new_tokens=99))
        while not server.running:
            await asyncio.sleep(0.01)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        while server.running:  # nobody wants it any more
            await asyncio.sleep(0.01)
        with pytest.raises(apr.InvalidInput, match="tokenizer"):
            await anext(apr.astream(engine, [], **GREEDY))
        timed = await asyncio.wait_for(write(engine, PROMPT, max_new_tokens=99, max_time=0.3), 9)
        turning.cancel()
        return found, timed

    with remote.Engine(server.url, "m") as engine:
        found, timed = asyncio.run(main(engine))
        assert engine.stats.cancelled == 2 and 0 < len(timed) < 99
    for ids, prompt in zip(found, prompts, strict=True):
        near = local(apr.majority_vote, tok, prompt, n=1, extract=len, **GREEDY)
        assert ids == near.threads[0].tokens
