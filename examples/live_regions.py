"""Two writers that read each other while they write, on any model (Hogwild! Inference, arXiv
2504.06261).
"""

from __future__ import annotations

import sys

import torch

import apr
from apr import countdown, hf


def main(path: str, prompt: str, steps: int) -> None:
    model, tokenizer = hf.load(path, dtype=torch.float32)
    ids = tokenizer(prompt).input_ids
    with apr.Session(model) as session:
        shared = session.segment(ids)
        alice, bob = session.region(base=len(ids)), session.region(base=len(ids))
        # Each view ends with the thread's own region; the other's moves it along as it grows.
        workers = [
            session.thread(view=[shared, bob, alice], writes=alice, visibility="current"),
            session.thread(view=[shared, alice, bob], writes=bob, visibility="current"),
        ]
        for worker in workers:
            worker.extend(ids[-1:])
        apr.decode(session, workers, do_sample=True, max_new_tokens=steps, eos_token_id=[])
        for name, region in (("alice", alice), ("bob", bob)):
            print(f"{name}: {tokenizer.decode(region.tokens)}")
        print(workers[0], session.stats)


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else str(countdown.CHECKPOINT),
        sys.argv[2] if len(sys.argv) > 2 else "<bos> 24 : 8 6 4 <try>",
        int(sys.argv[3]) if len(sys.argv) > 3 else 8,
    )
