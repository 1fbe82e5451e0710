"""What each rank of tests/test_ranks.py runs: a model in parts, beside the whole of it."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import apr
import scripted
from apr import _core, hf
from apr.protocols import PRESETS
from apr.strategies import Board
from kernel_cases import emulate

TOKENIZER = scripted.tokenizer()
PROMPT = "How far is it?"
SAMPLED = {"do_sample": True, "eos_token_id": []}


def logits(session):
    """Logits of every kind of step: forks, three joins, trims, live regions of three writers."""
    root = session.thread(TOKENIZER(PROMPT).input_ids)
    found = [session.step([root])]
    for positions in ("max", "sum", "keep"):
        kids = root.fork(3)
        for i, kid in enumerate(kids):
            kid.extend([20 + i, 30 + i])
        found.append(session.step(kids))
        root.join(kids, positions=positions)
        root.extend([9])
        found.append(session.step([root]))
    root.trim(len(root) - 2)
    found.append(session.step([root]))
    regions = [session.region(base=root.position + 40 * i) for i in range(3)]
    writers = [
        session.thread(
            [40 + i],
            view=[*root.view[:-1], *((region, region.base) for region in regions)],
            writes=regions[i],
            visibility="current",
        )
        for i in range(3)
    ]
    for turn in range(4):
        found.append(session.step(writers))
        for i, writer in enumerate(writers):
            writer.extend([50 + 3 * turn + i])
    session.check()
    return torch.cat(found)


def texts(session):
    """What methods write, protocols and `generate` with our cache, as token ids."""
    ids = TOKENIZER(PROMPT).input_ids
    many = apr.majority_vote(session, TOKENIZER, PROMPT, n=4, max_new_tokens=12, **SAMPLED)
    beams = apr.beam_search(session, TOKENIZER, PROMPT, num_beams=3, max_new_tokens=6)
    board = Board(past="", others="", own="", step=lambda name, number: [60], end=[7], check="")
    team = apr.hogwild(
        session,
        TOKENIZER,
        PROMPT,
        workers=3,
        board=board,
        answer_prompt=None,
        max_new_tokens=12,
        **SAMPLED,
    )
    grammar = dataclasses.replace(PRESETS["parathinker"], width=3)
    root = session.thread(ids, request=5)
    outcome = apr.run(session, root, grammar, tokenizer=TOKENIZER, max_new_tokens=10, **SAMPLED)
    model = session.model
    torch.manual_seed(4)
    made = model.generate(
        torch.tensor([ids], device=model.device),
        past_key_values=apr.Cache(model, max_tokens=2048),
        max_new_tokens=8,
        do_sample=True,
        top_k=0,
    )
    return [
        [item.tokens for item in many.threads],
        [item.tokens for item in beams.threads],
        [item.tokens for item in team.threads],
        [outcome.text, outcome.total_tokens],
        made.tolist(),
    ]


def replayed(parts):
    """Steps that a GPU replays, which is emulated here: equal to planned ones, and compared too."""
    if _core.gpu(True) is None:
        return
    emulate(90)
    try:
        found = []
        for graphs in (None, True):
            with apr.Session(parts, 1024, 64, cuda_graphs=graphs, self_test=False) as session:
                kids = session.thread(TOKENIZER(PROMPT).input_ids).fork(2)
                items = apr.decode(session, kids, max_new_tokens=6, **SAMPLED)
                found.append([item.tokens for item in items])
                assert graphs is None or session._graphs.uploads > 0
                spare = session.thread([1, 2])
                session.step([spare])
                for turn in range(6):  # one rank lets go what the other still holds
                    if turn == 3 and dist.get_rank():
                        del spare
                    for i, kid in enumerate(kids):
                        kid.extend([7 + i])
                    session.step(kids)
                kids[0].extend([5 + dist.get_rank()])
                kids[1].extend([7])
                try:
                    session.step(kids)
                    raise AssertionError("nobody was told")
                except apr.RanksDiffer:
                    pass
        assert found[0] == found[1]
    finally:
        _core.force_instruction_set("")


def equal(parts, folder):
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with apr.Session(parts, 4096, 16) as ours, apr.Session(whole, 4096, 16) as theirs:
        assert (ours.ranks.size, theirs.ranks.size) == (2, 1)
        found, wanted = logits(ours), logits(theirs)
        apart = float((found - wanted).abs().max() / wanted.std())
        assert apart < 1e-5, apart
        written = texts(ours)
        assert written == texts(theirs)
        seen = [None, None]
        dist.all_gather_object(seen, [written, ours.table.ask().num_pages])
        assert seen[0] == seen[1]
        kid = ours.thread(TOKENIZER(PROMPT).input_ids).fork()[0]
        ours.save(Path(folder) / "kid.safetensors", {"kid": kid})
        more = apr.decode(ours, [kid], max_new_tokens=5, **SAMPLED)[0].tokens
    again, named = apr.Session.open(Path(folder) / "kid.safetensors", parts)
    with again:
        assert apr.decode(again, [named["kid"]], max_new_tokens=5, **SAMPLED)[0].tokens == more
        late = apr.decode(
            again,
            again.thread([5]).fork(2),
            max_new_tokens=3000,
            max_time=0.3 + 0.4 * dist.get_rank(),
            **SAMPLED,
        )
        seen = [None, None]
        dist.all_gather_object(seen, [len(item.tokens) for item in late])
        assert seen[0] == seen[1] and {item.finish for item in late} == {"time"}
    assert crowded(parts, **SMALL) == crowded(parts, max_tokens=4096)
    replayed(parts)
    print(f"apart {apart:.1e}", flush=True)


# A pool that grows, and that holds less than `crowded` asks for: pages wait elsewhere.
SMALL = {"max_tokens": 256, "start_tokens": 64, "on_full": "offload"}


def crowded(model, **room):
    """What twelve threads and a long one write."""
    with apr.Session(model, page_size=16, seed=1, **room) as session:
        kids = session.thread(TOKENIZER(PROMPT).input_ids).fork(12)
        for _ in range(2):
            apr.decode(session, kids, max_new_tokens=20, **SAMPLED)
            spare = session.thread([3] * 200)
            session.step([spare])
            spare.release()
        if session.memory.offload is not None:
            assert session.memory.offload.nbytes and session.table.ask().num_pages == 16
        return [kid.tokens for kid in kids]


def refused(parts, rank):
    """Ranks that do different things are told so, nothing is lost, and they can go on."""
    with apr.Session(parts, 4096) as session, apr.Session(parts, 4096) as other:
        kids = session.thread([1, 2, 3]).fork(2)
        first = session.step(kids)

        def raised(call):
            try:
                call()
            except Exception as error:
                return type(error).__name__
            return "nothing"

        assert raised(lambda: apr.Session(parts, 4096, invariant=bool(rank))) == "RanksDiffer"
        kids[0].extend([5 + rank])
        assert raised(lambda: session.step(kids)) == "RanksDiffer"
        assert (len(kids[0]), kids[0].queued) == (4, 1)
        kids[0].trim(3)
        assert torch.allclose(session.step(kids), first, atol=1e-5)

        # Two threads that look alike, in another order; another session.
        a, b = (session.thread(ids) for ids in ([5, 6, 7], [50, 60, 70]))
        session.step([a, b])
        a.extend([9])
        b.extend([9])
        assert raised(lambda: session.step([a, b] if rank else [b, a])) == "RanksDiffer"
        session.step([a, b])
        fresh = [one.thread([1, 2, 3]) for one in (session, other)]
        both = [session, other]
        assert raised(lambda: both[rank].step([fresh[rank]])) == "RanksDiffer"

        class Odd:
            def __call__(self, ids, scores):
                if rank == 1 and ids.shape[1] > 5:
                    raise KeyError("mine")
                return scores

        def decode():
            return apr.decode(session, kids, logits_processor=[Odd()], max_new_tokens=9, **SAMPLED)

        assert raised(decode) == ["RanksDiffer", "KeyError"][rank]
        assert [len(kid) for kid in kids] == [6, 6]
        assert raised(lambda: session.step([])) == "InvalidInput"
        session.check()
        assert session.step([session.thread([7, 8])]).isfinite().all()
    print("refused and well", flush=True)


def lost(parts, rank, how):
    """A rank that is killed, or stands still: the other ends with an error."""
    others = [0, 0]
    dist.all_gather_object(others, os.getpid())
    with apr.Session(parts, 4096, rank_timeout=3) as session:
        kids = session.thread([1, 2, 3]).fork(2)
        began = 0.0
        try:
            for turn in range(100):
                apr.decode(session, kids, max_new_tokens=2, **SAMPLED)
                if rank == 1 and turn == 3:
                    os.kill(os.getpid(), getattr(signal, how))
                began = time.monotonic()
        except apr.RanksDiffer as error:
            assert "rank 0 of 2" in str(error) and time.monotonic() - began < 30
            session.check()
            print(f"told after {time.monotonic() - began:.1f} s", flush=True)
            os.kill(others[1], signal.SIGKILL)
            os._exit(7)  # a group of which a rank is gone cannot be left in order
    raise AssertionError("nobody was told")


def main():
    folder = sys.argv[1]
    dist.init_process_group("gloo")
    parts, _ = hf.load(folder, ranks=2)
    for what in sys.argv[2:]:
        if what == "equal":
            equal(parts, folder)
        elif what == "refused":
            refused(parts, dist.get_rank())
        else:
            lost(parts, dist.get_rank(), what)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
