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
    """In order, in one namespace: later blocks, those of docs/ too, use the model that the first
    one loads.
    """
    namespace: dict[str, object] = {}
    found = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        found += len(blocks)
        for block in blocks:
            exec(compile(block, page.name, "exec"), namespace)
    assert found >= 7


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
