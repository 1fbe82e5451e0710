"""How a Hugging Face model is attached: what it is, measured, and its forwards on our attention."""

from __future__ import annotations

from apr.hf.loading import load

__all__ = ["load"]
