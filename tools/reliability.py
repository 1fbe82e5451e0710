"""What docs/reliability.md promises, tried at length: `make reliability`, under half an hour."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent


def run(command: list[str]) -> tuple[str, bool]:
    """What a command prints, and whether it succeeded; shown where it did not."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    print(f"{' '.join(command)}: {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode:
        print(text[-3000:])
    return text, done.returncode == 0


def first(pattern: str, text: str) -> str:
    """What a pattern's group finds, or that it finds nothing."""
    found = re.search(pattern, " ".join(text.split()))
    return found[1] if found else "not reported"


def counted(python: str, tests: str, what: str) -> tuple[str, bool]:
    """How many of something the tests of a file had, by their own count."""
    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/report.xml"
        command = [python, "-m", "pytest", "-q", f"tests/{tests}"]
        command += ["-o", "junit_family=xunit1", "--junitxml", report]
        _, good = run(command)
        if not Path(report).exists():
            return "not reported", False
        numbers = [
            int(p.get("value", "0"))
            for p in ElementTree.parse(report).iter("property")
            if p.get("name") == what
        ]
    return str(sum(numbers)), good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=200_000)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-sanitizers", action="store_true", help="they take seven minutes")
    options = parser.parse_args()
    python, seed = sys.executable, str(options.seed)
    soak, good = run(
        [python, "-m", "apr", "soak", "--ops", str(options.ops), "--seed", seed, "--faults", "0.15"]
    )
    lines, lines_good = counted(python, "test_interrupts.py", "interrupts")
    files, files_good = counted(python, "test_saving.py", "damaged")
    fuzz, fuzz_good = run([python, "tools/fuzz.py", "--calls", str(options.calls), "--seed", seed])
    sanitizers, clean = "not run", True
    if not options.no_sanitizers:
        _, clean = run(["make", "sanitize"])
        sanitizers = "0" if clean else "some, see above"

    table = Table("what", "how much")
    table.add_row("operations", first(r"(\d+) operations in", soak))
    for kind in (
        "before attention",
        "after attention",
        "interrupt",
        "nan",
        "streamer",
        "signal",
        "OutOfPages",
    ):
        table.add_row(f"  faults: {kind}", first(rf"{kind} +(\d+)", soak))
    table.add_row("  rows of logits beside float64", first(r"(\d+) logits rows", soak))
    table.add_row("interrupts by line", lines)
    table.add_row("files, or rows of them, damaged", files)
    table.add_row("calls with any arguments", first(r"(\d+) calls", fuzz))
    table.add_row("sanitizer findings", sanitizers)
    table.add_row("pages, threads, segments left", first(r"segments left: (\d+)", soak))
    table.add_row("tokens lost", first(r"tokens lost: (\d+)", soak))
    table.add_row("crashes", first(r"processes that ended: (\d+)", fuzz))
    Console().print(table)
    raise SystemExit(not (good and lines_good and files_good and fuzz_good and clean))


if __name__ == "__main__":
    main()
