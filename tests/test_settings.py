"""What a user sets torch to reaches nothing of ours: default dtype and device, autocast, inference
mode.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import apr
from apr import _core
from kernel_cases import emulate
from models import CLOSE, build, distance, stock, tokens
from test_beam_search import Words
from test_leaks import METHODS, SHORT

PROMPT = tokens(11)


def replay():
    """Run on the emulated GPU, where graphs are replayed."""
    if _core.gpu(True) is None:
        pytest.skip("this build has no emulated GPU (APR_EMULATION=ON)")
    emulate(90)


def test_switches_of_torch_do_not_reach_a_measurement():
    model = build("mistral")
    want = stock(model, PROMPT)[-1]
    models = [build("mistral") for _ in range(3)]
    sessions = []
    try:
        torch.set_default_dtype(torch.bfloat16)
        sessions.append(apr.Session(models[0], max_tokens=512))
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        sessions.append(apr.Session(models[1], max_tokens=512))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sessions.append(apr.Session(models[2], max_tokens=512))
        inside = sessions[-1].step([sessions[-1].thread(PROMPT)])[0]
    assert CLOSE < distance(inside, want) < 0.1 * float(want.std())  # bfloat16 products, as asked
    for s in sessions:
        assert distance(s.step([s.thread(PROMPT)])[0], want) < CLOSE
        assert s.spec.layers == sessions[0].spec.layers
        # Seen elsewhere than where it was written: turned by angles that know no default dtype.
        far = s.region([6, 7], base=100)
        t = s.thread(view=[(s.segment([3, 4, 5]), 0), (far, 3)], writes=far)
        assert distance(s.step([t])[0], stock(model, [3, 4, 5, 6, 7])[-1]) < CLOSE
        s.close()


@pytest.mark.parametrize("replays", [False, True])
def test_switches_of_torch_do_not_reach_a_run(replays):
    """Its default dtype and device, whatever the methods run on; replayed steps turn keys too."""
    model, prompt = build("llama").to(torch.bfloat16), tokens(9, 1)

    def written():
        with apr.Session(model, 4096, cuda_graphs=replays or None, self_test=False) as s:
            for name, options in METHODS.items():
                result = getattr(apr, name)(s, Words(), prompt, **SHORT, **options)
                yield name, [(item.tokens, item.logprobs) for item in result.threads], result.scores

    if replays:
        replay()
    try:
        want = list(written())
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        assert list(written()) == want
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        _core.force_instruction_set("")


OFFLOADS = {"max_tokens": 160, "page_size": 16, "on_full": "offload"}
GROWS = {"max_tokens": 2048, "page_size": 16, "start_tokens": 64}
REPLAYS = {"max_tokens": 2048, "page_size": 16, "cuda_graphs": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", OFFLOADS), ("llama", GROWS), ("llama", REPLAYS), ("lfm2", REPLAYS)],
)
def test_inference_mode_may_begin_and_end_at_any_step(name, options):
    """What a session keeps may be written outside of the mode that it was made in."""
    model, found = build(name).bfloat16(), []
    if options is REPLAYS:
        replay()
    try:
        for modes in ([False], [True, False]):
            mode = itertools.cycle(modes)
            with torch.inference_mode(next(mode)):
                session = apr.Session(model, self_test=False, **options)
                kids = session.thread(PROMPT).fork(6)
                run = apr.stream(
                    session, kids, max_new_tokens=30, eos_token_id=[], repetition_penalty=1.3
                )
            found.append([])
            steps = iter(run)
            while kids[0] in run:
                with torch.inference_mode(next(mode)):
                    found[-1].append(list(next(steps).tokens.values()))
            session.close()
    finally:
        _core.force_instruction_set("")
    assert found[0] == found[1] and len(found[0]) >= 30
