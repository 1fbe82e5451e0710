"""Attack a session: random operations, faults and signals, each compared with a float64 oracle."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from apr import soak
from apr.errors import InvalidInput
from apr.soak.oracle import tiny_model
from apr.soak.steps import Operation

ROUND = 200  # operations of one session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=int, default=20_000, help="operations, in sessions of 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.1, help="share of them with a fault")
    parser.add_argument("--out", type=Path, help="write the program of a failure here")


def main(options: argparse.Namespace) -> None:
    if options.ops < 1:
        raise InvalidInput(f"--ops: got {options.ops}; expected at least 1")
    if not 0 <= options.faults <= 1:
        raise InvalidInput(f"--faults: got {options.faults}; expected 0 to 1")
    console, model, tally = Console(), tiny_model(), soak.Tally()
    rounds, began = -(-options.ops // ROUND), time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        for i in progress.track(range(rounds), description="sessions"):
            operations = soak.program(options.seed + i, ROUND, options.faults)
            try:
                soak.play(operations, model, tally)
            except Exception as error:
                progress.stop()
                _report(console, operations, error, model, options)
                raise SystemExit(1) from error
    console.print(_table(tally))
    console.print(
        f"{sum(tally.operations.values())} operations in {rounds} sessions of seeds {options.seed} "
        f"to {options.seed + rounds - 1}, {time.perf_counter() - began:.0f} s; {tally.rows} logits "
        f"rows compared with float64, at most {tally.worst:.1e} standard deviations off; pages, "
        "threads and segments left: 0; tokens lost: 0",
        highlight=False,
    )


def _table(tally: soak.Tally) -> Table:
    table = Table("operation", "times", "fault", "came", box=None, pad_edge=False)
    faults = [*sorted(tally.faults.items()), *[("", "")] * len(tally.operations)]
    for (name, times), (kind, came) in zip(sorted(tally.operations.items()), faults, strict=False):
        table.add_row(name, str(times), kind, str(came))
    return table


def _report(
    console: Console,
    operations: Sequence[Operation],
    error: Exception,
    model: Any,
    options: argparse.Namespace,
) -> None:
    """The fewest operations that fail in the same way, as a program."""

    def fails(some: Sequence[Operation]) -> bool:
        try:
            soak.play(some, model)
        except Exception as other:
            return type(other) is type(error)
        return False

    console.print(f"{type(error).__name__}: {error}", style="bold", highlight=False)
    console.print("looking for the fewest operations that fail ...")
    if fails(operations):
        text = soak.script(soak.shrink(operations, fails))
    else:
        text = soak.script(operations)
        console.print("it does not fail again: it depends on when a signal came")
    if options.out:
        options.out.write_text(text)
        console.print(f"written to {options.out}")
    else:
        sys.stdout.write(text)
