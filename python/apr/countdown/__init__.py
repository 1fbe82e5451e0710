"""The Countdown task: problems, tokenizer, trainer and the checkpoint that the package ships."""

from __future__ import annotations

from pathlib import Path

from apr.countdown.problems import Problem, Range, sample_problems, verify

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT", "Problem", "Range", "sample_problems", "verify"]
