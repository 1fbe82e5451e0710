"""Python blocks of the README and of the docs, commands, and examples run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from apr.__main__ import main
from apr.commands import bench

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = re.findall(
    r"^python -m apr (.+?)(?:\s+#.*)?$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE
)
# test_commands.py runs these, and looks at what they write.
RUN_ELSEWHERE = [f"bench {what} --smoke" for what in bench.BENCHES]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_python_blocks(page):
    """In order, in one namespace: a page stands alone."""
    namespace: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RUN_ELSEWHERE])
def test_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("/tmp/", f"{tmp_path}/") for a in shlex.split(command)]
    assert main(arguments) == 0


def test_commands_were_found():
    assert len(COMMANDS) == 27
    assert sum(command in RUN_ELSEWHERE for command in COMMANDS) == 16


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples(example):
    subprocess.run([sys.executable, str(example)], check=True, timeout=300)
