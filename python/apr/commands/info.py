"""Print what this installation is: versions, kernels that were built and run here, memory."""

from __future__ import annotations

import argparse
import platform

import torch
import transformers

import apr
from apr import countdown, ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(options: argparse.Namespace) -> None:
    del options
    kernels = ops.kernels()
    rows = {
        "apr": apr.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "CPU kernels": f"{kernels.chosen} (built and runnable here: {', '.join(kernels.cpu)})",
        "CPU threads": kernels.threads,
        "CUDA kernels": kernels.cuda or "none in this build: CPU tensors only",
        "CUDA device": (
            torch.cuda.get_device_name() if torch.cuda.is_available() else "none seen by torch"
        ),
        "Countdown model": str(countdown.CHECKPOINT)
        if (countdown.CHECKPOINT / "model.safetensors").exists()
        else "not shipped with this copy: python -m apr train countdown",
    }
    for name, value in rows.items():
        print(f"{name:16}{value}")
