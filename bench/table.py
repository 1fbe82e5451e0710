"""Turns the figures of `apr bench gpu --json` into Markdown tables: python bench/table.py IN.json
OUT.md.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def attention_tables(rows: list[dict[str, Any]]) -> list[str]:
    """One line a method and shape, with its ratio to the floor and to apr."""
    shapes = defaultdict(list)
    for row in rows:
        if "times_floor" in row:
            shapes[row["name"].rsplit(": ", 1)[0]].append(row)
    lines = [
        "| step | method | µs | p90 | + planner, µs | of copy rate | × floor | × apr | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, methods in shapes.items():
        best = next(m["median_us"] for m in methods if m["method"] == "apr")
        for m in methods:
            planner = f"{m['median_us'] + m['planner_us']:.1f}" if "planner_us" in m else ""
            error = "" if m["error"] is None else f"{m['error']:.1e}"
            lines.append(
                f"| {name} | {m['method']} | {m['median_us']:.1f} | {m['p90_us']:.1f} | {planner} "
                f"| {m['of_copy_rate']:.0%} | {m['times_floor']:.2f} | {m['median_us'] / best:.2f} "
                f"| {error} |"
            )
    return lines


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    record = json.loads(source.read_text())
    rows = record["rows"]
    lines = [f"# {record['machine'].get('gpu') or record['machine']['cpu']}", ""]
    lines += [
        f"`bench/device.sh`; {json.dumps(record['machine'])}",
        "",
        *attention_tables(rows),
        "",
    ]
    lines += ["| other | µs | [p10, p90] | |", "|---|---|---|---|"]
    for row in rows:
        if "times_floor" not in row:
            spread = f"[{row['p10_us']:.1f}, {row['p90_us']:.1f}]"
            lines.append(
                f"| {row['name']} | {row['median_us']:.1f} | {spread} | {row.get('note', '')} |"
            )
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
