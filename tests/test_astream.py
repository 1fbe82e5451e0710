"""Tasks of asyncio on one session: one batched step for all that wait, and each writes as if
it were alone.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import LogitsProcessor

import apr
from models import tokens

SAMPLED = {"do_sample": True, "eos_token_id": [], "max_new_tokens": 6}


class Breaks(LogitsProcessor):
    def __call__(self, ids, scores):
        raise RuntimeError("on purpose")


async def write(s, threads, **options):
    async for _ in apr.astream(s, threads, **{**SAMPLED, **options}):
        pass
    return [t.own_tokens for t in threads]


def test_what_is_no_session_is_refused(llama):
    with pytest.raises(apr.InvalidInput, match="expected a Session"):
        asyncio.run(anext(apr.astream(llama, [])))


async def ask(s, thread):
    await anext(apr.astream(s, [thread], **SAMPLED))


def alone(llama, i, **options):
    with apr.Session(llama, max_tokens=2048) as s:
        kids = s.thread(tokens(5 + i, i), request=i).fork(2)
        with apr.stream(s, kids, **{**SAMPLED, **options}) as run:
            for _ in run:
                pass
        return [kid.own_tokens for kid in kids]


def test_tasks_share_their_steps(llama):
    lengths = [6, 3, 6, 4]

    async def main(s):
        crews = [s.thread(tokens(5 + i, i), request=i).fork(2) for i in range(4)]
        return await asyncio.gather(
            *(write(s, c, max_new_tokens=n) for c, n in zip(crews, lengths, strict=True))
        )

    with apr.Session(llama, max_tokens=2048) as s:
        written = asyncio.run(main(s))
        assert s.stats.steps == max(lengths) and not s.waiting
    for i, n in enumerate(lengths):
        assert written[i] == alone(llama, i, max_new_tokens=n)


def test_a_task_forks_and_joins_between_its_steps(llama):
    async def think(s, i):
        root = s.thread(tokens(5, i), request=i)
        kids = root.fork(2)
        await write(s, kids)
        await asyncio.sleep(0.001 * i)
        root.join(kids)
        root.extend([7])
        await write(s, [root])
        return root.tokens

    async def main(s, which):
        return await asyncio.gather(*(think(s, i) for i in which))

    together, each = [], []
    with apr.Session(llama, max_tokens=2048) as s:
        together = asyncio.run(main(s, range(3)))
    for i in range(3):
        with apr.Session(llama, max_tokens=2048) as s:
            each += asyncio.run(main(s, [i]))
    assert together == each


def test_an_error_reaches_its_task_alone(llama):
    def stop(written):
        raise ValueError("a stop rule")

    async def main(s):
        crews = [s.thread(tokens(5 + i, i), request=i).fork(2) for i in range(4)]
        return await asyncio.gather(
            write(s, crews[0]),
            write(s, crews[1], logits_processor=lambda thread: [Breaks()]),
            write(s, crews[2], stop=stop),
            write(s, crews[3]),
            return_exceptions=True,
        )

    with apr.Session(llama, max_tokens=2048) as s:
        written = asyncio.run(main(s))
        s.check()
    assert written[0] == alone(llama, 0) and written[3] == alone(llama, 3)
    assert isinstance(written[1], RuntimeError) and isinstance(written[2], ValueError)


def test_a_fault_of_the_model_reaches_all_and_loses_nothing(llama):
    async def main(s, crews):
        return await asyncio.gather(*(write(s, c) for c in crews), return_exceptions=True)

    with apr.Session(llama, max_tokens=2048) as s:
        crews = [s.thread(tokens(5 + i, i), request=i).fork(2) for i in range(2)]
        hook = llama.lm_head.register_forward_hook(lambda *_: torch.full((1, 4, 128), torch.nan))
        try:
            failed = asyncio.run(main(s, crews))
        finally:
            hook.remove()
        assert all(isinstance(error, apr.NonFiniteLogits) for error in failed)
        assert asyncio.run(main(s, crews)) == [alone(llama, 0), alone(llama, 1)]


def test_cancellation_ends_a_run_between_steps(llama):
    async def main(s):
        crews = [s.thread(tokens(5 + i, i), request=i).fork(2) for i in range(2)]
        task = asyncio.create_task(write(s, crews[0], max_new_tokens=100))
        other = asyncio.create_task(write(s, crews[1]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        written = await other
        assert len({len(kid.own_tokens) for kid in crews[0]}) == 1  # both took as many
        return written

    with apr.Session(llama, max_tokens=2048) as s:
        assert asyncio.run(main(s)) == alone(llama, 1)
        assert s.stats.threads == 0 and not s.waiting


def test_two_event_loops_are_refused_by_name(llama):
    with apr.Session(llama, max_tokens=512) as s:
        a, b = s.thread(tokens(5)), s.thread(tokens(6))
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(ask(s, a))
        loop.call_soon(loop.stop)
        loop.run_forever()  # it has asked, and its step has not come
        with pytest.raises(apr.InvalidInput, match="another event loop"):
            asyncio.run(ask(s, b))
        loop.run_until_complete(waiting)
        loop.close()


@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt])
def test_nobody_waits_for_ever(llama, error):
    def stop(written):
        raise error

    async def main(s, crews):
        return await asyncio.wait_for(
            asyncio.gather(
                write(s, crews[0], stop=stop), write(s, crews[1]), return_exceptions=True
            ),
            timeout=20,
        )

    with apr.Session(llama, max_tokens=2048) as s:
        crews = [s.thread(tokens(5 + i, i), request=i).fork(2) for i in range(2)]
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(main(s, crews))
            assert asyncio.run(write(s, crews[1], max_new_tokens=1)) is not None
            return
        failed, written = asyncio.run(main(s, crews))
        assert isinstance(failed, RuntimeError) and "StopIteration" in str(failed)
        assert written == alone(llama, 1)


def test_threads_that_are_gone_or_anothers_stop_their_own_task(llama):
    async def main(s, crews):
        tasks = [asyncio.create_task(write(s, crew)) for crew in (*crews, crews[1])]
        await asyncio.sleep(0)
        crews[0][0].release()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with apr.Session(llama, max_tokens=2048) as s:
        crews = [s.thread(tokens(5 + i, i), request=i).fork(2) for i in range(2)]
        gone, written, twice = asyncio.run(main(s, crews))
    assert isinstance(gone, apr.ThreadReleased) and written == alone(llama, 1)
    assert isinstance(twice, apr.InvalidInput) and "in the run of another task" in str(twice)


def test_an_event_loop_that_was_closed_blocks_nobody(llama):
    with apr.Session(llama, max_tokens=512) as s:
        a, b = s.thread(tokens(5)), s.thread(tokens(6))
        loop = asyncio.new_event_loop()
        task = loop.create_task(ask(s, a))
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        asyncio.run(ask(s, b))
        assert len(b.own_tokens) == 7
        del task
