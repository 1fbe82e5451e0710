"""Random operations beside an independent account of them: `python -m apr soak`."""

from apr.soak.edits import Failure, Tally
from apr.soak.programs import play, program, replay
from apr.soak.shrinking import script, shrink

__all__ = ["Failure", "Tally", "play", "program", "replay", "script", "shrink"]
