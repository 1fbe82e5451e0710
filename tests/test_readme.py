"""The README's Python blocks and commands, and the examples, run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from apr.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m apr (.+?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_python_blocks():
    """In order, in one namespace: later blocks use the model that the first one loads."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("/tmp/", f"{tmp_path}/") for a in shlex.split(command)]
    assert main(arguments) == 0


def test_commands_were_found():
    assert len(COMMANDS) == 18


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples(example):
    subprocess.run([sys.executable, str(example)], check=True, timeout=300)
