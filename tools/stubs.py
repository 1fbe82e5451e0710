"""Writes python/apr/_core.pyi from the built extension; with --check, fails where it has
drifted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parent.parent / "python" / "apr" / "_core.pyi"


def generate() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "apr._core", "--output-dir", folder]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        stub = (Path(folder) / "apr" / "_core.pyi").read_text()
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TARGET), "-"],
        input=stub,
        check=True,
        capture_output=True,
        text=True,
    )
    return formatted.stdout


def main() -> int:
    stub = generate()
    if "--check" not in sys.argv:
        TARGET.write_text(stub)
    elif TARGET.read_text() != stub:
        print(f"{TARGET} differs from the built extension: run `make stubs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
