"""The kernels on tensors: plan, append, attention, merge, sample. No threads, no model."""

from __future__ import annotations

from apr.ops.calls import append, attention, copy_tokens, merge
from apr.ops.codes import decode, encode
from apr.ops.draws import Draws, Sampled, sample
from apr.ops.machine import Kernels, kernels
from apr.ops.plans import Plan, Rotation, View, plan
from apr.ops.pools import Pool, empty_pool

__all__ = [
    "Draws",
    "Kernels",
    "Plan",
    "Pool",
    "Rotation",
    "Sampled",
    "View",
    "append",
    "attention",
    "copy_tokens",
    "decode",
    "empty_pool",
    "encode",
    "kernels",
    "merge",
    "plan",
    "sample",
]
