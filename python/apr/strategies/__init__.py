"""Methods that a driver controls: one file a method, a few dozen lines over Session and decode."""

from apr.strategies._answers import boxed, last_number, matching
from apr.strategies._requests import Result
from apr.strategies._reward import RewardModel
from apr.strategies._thoughts import ModelValue, Node
from apr.strategies.beam_search import beam_search
from apr.strategies.best_of_n import best_of_n
from apr.strategies.branching_vote import branching_vote
from apr.strategies.group_think import group_think
from apr.strategies.hogwild import Board, Team, hogwild
from apr.strategies.majority_vote import majority_vote
from apr.strategies.mcts import mcts
from apr.strategies.parathinker import parathinker
from apr.strategies.skeleton import skeleton
from apr.strategies.tree_search import tree_search

__all__ = [
    "Board",
    "ModelValue",
    "Node",
    "Result",
    "RewardModel",
    "Team",
    "beam_search",
    "best_of_n",
    "boxed",
    "branching_vote",
    "group_think",
    "hogwild",
    "last_number",
    "majority_vote",
    "matching",
    "mcts",
    "parathinker",
    "skeleton",
    "tree_search",
]
