"""Layers on two devices that only pretend to be (pretend_device.cpp): pools follow layers, and a
session does as on one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from apr.ops import pages

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The two devices, compiled against the torch that runs."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    path = tmp_path_factory.mktemp("pretend") / "pretend_device.so"
    torch_paths = [f"-I{p}" for p in cpp_extension.include_paths()]
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()]
    source = str(HERE / "pretend_device.cpp")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", *torch_paths, *libraries]
    command = ["g++", *flags, source, "-lc10", "-ltorch_cpu", "-o", str(path)]
    subprocess.run(command, check=True, timeout=300)
    return str(path)


def run(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, "devices_program.py", *arguments],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


STATES = ["lfm2", "qwen3_next", "mamba"]


# Windows and chunks; learned positions and tied heads; rows of a cache of its own; latents;
# states; the kernels of an emulated GPU.
@pytest.mark.parametrize("kernels", ["cpu", "90"])
def test_layers_on_two_devices_are_one_model(library, kernels):
    names = {
        "cpu": ["llama", "gemma3", "llama4", "gpt2", "bloom", "deepseek", *STATES],
        "90": ["llama", "lfm2"],
    }[kernels]
    assert run(library, kernels, *names).split() == names


def test_a_pool_by_free_memory_fits_every_device(monkeypatch):
    roomy, full = torch.device("cpu"), torch.device("meta")
    free = {roomy: 1 << 30, full: 1 << 26}
    monkeypatch.setattr(pages, "_free_memory", free.__getitem__)
    alone = [pages.pages_for(None, {device: 4096}, 16) for device in (roomy, full)]
    assert pages.pages_for(None, {roomy: 4096, full: 4096}, 16) == alone[1] < alone[0]
    assert pages.pages_for(None, {roomy: 1 << 20, full: 4096}, 16) < alone[1]


def test_a_step_waits_once(library):
    """Planned or replayed, on an emulated GPU whose memory is not the host's."""
    names = ["waits:llama", "waits:lfm2"]
    assert run(library, "90", *names).split() == names


def test_what_a_session_does_on_two_devices(library):
    """Vectors, codes, pools that grow and empty themselves, pools of all that is free; graphs are
    refused.
    """
    assert run(library, "cpu", "life").split() == ["life"]
