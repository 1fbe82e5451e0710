"""Methods of parallel thinking, one file each; `apr.majority_vote` and its like are functions of
them.
"""

from __future__ import annotations

from apr.strategies._answers import boxed, last_number, matching
from apr.strategies._requests import Result
from apr.strategies._reward import RewardModel
from apr.strategies._thoughts import ModelValue, Node
from apr.strategies.hogwild import Board, Team

__all__ = [
    "Board",
    "ModelValue",
    "Node",
    "Result",
    "RewardModel",
    "Team",
    "boxed",
    "last_number",
    "matching",
]
