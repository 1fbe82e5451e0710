"""The Countdown task: problems, tokenizer, trainers and the checkpoints that the package ships."""

from __future__ import annotations

from pathlib import Path

from apr.countdown.problems import Problem, Range, sample_problems, verify

CHECKPOINT = Path(__file__).parent / "checkpoint"  # guesses, three numbers
ADAPTIVE = (
    Path(__file__).parent / "adaptive_checkpoint"
)  # guesses, spawns and joins, four and five numbers

__all__ = ["ADAPTIVE", "CHECKPOINT", "Problem", "Range", "sample_problems", "verify"]
