"""Hundreds of runs of all methods in one session: no page, thread or segment stays, and figures do
not creep.
"""

from __future__ import annotations

import gc

import pytest
import torch

import apr
from apr import _core
from apr.strategies import Board
from kernel_cases import emulate
from models import build, stock, tokens
from test_beam_search import Words

SHORT = {"max_new_tokens": 4, "eos_token_id": [2, 50], "seed": 0}
BOARD = Board(past=[101], others=[102], own=[103], step=lambda *_: [104], end=[7], check=[])
TAGS = {
    "think": lambda i: [100 + i],
    "end_think": lambda i: [110 + i],
    "summary": lambda i: [120],
    "end_summary": lambda i: [121],
}


def two(written):
    return len(written) % 2 == 0


METHODS = {
    "majority_vote": {"n": 3},
    "best_of_n": {"n": 3},
    "beam_search": {"num_beams": 3},
    "tree_search": {"n": 2, "depth": 2, "evaluate": len, "stop": two},
    "mcts": {"n": 2, "iterations": 3, "depth": 2, "reward": lambda t: 0.5, "stop": two},
    "parathinker": {"n": 2, "summary_tokens": 3, **TAGS},
    "group_think": {"n": 2, "start": lambda i: [100 + i], "answer_prompt": [9], "answer_tokens": 2},
    "hogwild": {"workers": 2, "board": BOARD, "answer_prompt": [9], "answer_tokens": 2},
}


def test_methods_run_on_the_emulated_gpu_by_graphs():
    """All of them; and what threads of a prompt alone hold, against the stock forward in
    bfloat16.
    """
    if _core.gpu(True) is None:
        pytest.skip("this build has no emulated GPU (APR_EMULATION=ON)")
    model = build("llama").to(torch.bfloat16)
    prompts = [tokens(9, 1), tokens(7, 2)]
    emulate(90)
    try:
        with apr.Session(model, max_tokens=4096, cuda_graphs=True, self_test=False) as s:
            for name, options in METHODS.items():
                results = getattr(apr, name)(
                    s, Words(), prompts, **{**SHORT, "max_new_tokens": 8}, **options
                )
                assert s.stats.used_pages == 0, name
                if name in ("parathinker", "group_think", "hogwild"):
                    continue
                for ids, result in zip(prompts, results, strict=True):
                    for item in result.threads:
                        rows = stock(model, [*ids, *item.tokens])[len(ids) - 1 : -1]
                        want = rows.log_softmax(-1)[range(len(item.tokens)), item.tokens]
                        got = torch.tensor(item.logprobs)
                        # Two layers round to 2^-8 of values of order 1, in other orders of sums.
                        assert (got - want).abs().max().item() < 0.15, name
            assert 0 < s._graphs.captures <= 6
    finally:
        _core.force_instruction_set("")


def test_hundreds_of_runs_leave_nothing():
    model = build("llama")
    with apr.Session(model, max_tokens=2048, page_size=16) as s:
        for run in range(25):
            for name, options in METHODS.items():
                result = getattr(apr, name)(
                    s, Words(), tokens(5 + run % 7, run), **SHORT, **options
                )
                assert result.total_tokens >= result.critical_path_tokens >= 0
                stats = s.stats
                assert (stats.used_pages, stats.threads) == (0, 0), (name, run)
        assert s.table.ask().num_segments == 0
        del result
        gc.collect()
        assert not s.table._segments and s.table.ask().num_threads == 0
