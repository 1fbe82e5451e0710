"""Random operations beside an independent account of them: `python -m apr soak`."""

from apr.soak.edits import Failure, Tally
from apr.soak.play import play, program, replay
from apr.soak.shrink import script, shrink

__all__ = ["Failure", "Tally", "play", "program", "replay", "script", "shrink"]
