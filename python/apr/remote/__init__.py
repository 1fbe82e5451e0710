"""Methods and protocols on a served model: `apr.remote.Engine` stands where a session would."""

from __future__ import annotations

from apr.remote.engine import Engine
from apr.remote.usage import Usage

__all__ = ["Engine", "Usage"]
