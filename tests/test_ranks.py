"""A model in parts: two ranks under torchrun do as one process does, or say that they do not."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import apr
import scripted
from apr.hf.ranks import Ranks
from models import random_weights

HERE = Path(__file__).parent


def torchrun(*arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def saved(path: Path, kv_heads: int) -> str:
    """A folder with a tiny model and its tokenizer."""
    tok = scripted.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tok) + len(tok) % 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
    )
    random_weights(LlamaForCausalLM(config)).save_pretrained(path)
    tok.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_ranks_are_one_model(tmp_path, kv_heads):
    """Ranks share KV heads out, or both have the only one: logits within 1e-5 standard deviations,
    which are sums in another order, and equal tokens.
    """
    ran = torchrun("ranks_program.py", saved(tmp_path, kv_heads), "equal")
    assert ran.returncode == 0 and ran.stdout.count("apart") == 2, ran.stdout + ran.stderr


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_ranks_that_differ_or_are_lost_are_told_of(tmp_path, how):
    before = ["refused"] if how == "SIGSTOP" else []
    ran = torchrun("ranks_program.py", saved(tmp_path, 2), *before, how)
    assert ran.stdout.count("refused and well") == 2 * len(before), ran.stdout + ran.stderr
    assert ran.returncode != 0 and ran.stdout.count("told after") == 1, ran.stdout + ran.stderr


PAGE = (HERE.parent / "docs" / "scale.md").read_text()


def test_the_command_of_the_page():
    command = re.findall(r"^torchrun --nproc-per-node 2 (.*run.*)$", PAGE, re.MULTILINE)
    assert len(command) == 1
    ran = torchrun(*shlex.split(command[0]))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("replayed by arithmetic") == 1  # the first rank prints


def test_the_program_of_the_page(tmp_path):
    block = re.findall(r"<!-- under torchrun -->\n```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "my-model").mkdir()
    saved(tmp_path / "my-model", 2)
    (tmp_path / "program.py").write_text(block[0])
    ran = torchrun("--redirects=3", f"--log-dir={tmp_path}", "program.py", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = [next(tmp_path.rglob(f"attempt_0/{rank}/stdout.log")).read_text() for rank in "01"]
    first, second = ([x[2:] for x in text.splitlines() if "[" in x] for text in told)
    assert len(first) == 8 and first == second


def test_one_process_waits_for_nobody(net):
    ranks = Ranks()
    values = torch.tensor([1.5])
    assert ranks.first(values) is values and ranks.least(3) == 3
    with ranks.taking_part(), ranks.together(7):
        pass
    for wrong in (0, -1, "1", None, True, float("nan")):
        with pytest.raises(apr.InvalidInput, match="rank_timeout"):
            apr.Session(net, max_tokens=64, rank_timeout=wrong)
