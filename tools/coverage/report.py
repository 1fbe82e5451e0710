"""docs/models.md, from the records of a sweep."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "models.md"


# The best first.
ORDER = ("plan", "plan and states", "rows", "refused", "not built")


def counts(records: dict[str, dict[str, Any]]) -> dict[str, int]:
    """How many architectures run how."""
    return dict(Counter(record["how"] for record in records.values()))


def _row(name: str, record: dict[str, Any]) -> str:
    how = record["how"]
    if record.get("note") == "positions are not turned":
        how = "plan, turned"
    bytes_of = [
        f"{record[key]:,}" if record.get(key) else "" for key in ("token_bytes", "state_bytes")
    ]
    generate = {None: "", 0.0: "equal"}.get(record.get("generate"), "differs")
    why = record.get("why", "").split(" cannot be attached: ")[-1].split(". apr needs")[0]
    if record.get("note") and how != "plan, turned":
        why = "; ".join(filter(None, (record["note"], why)))
    why = why.replace("|", "/").replace("\n", " ")[:150]
    return f"| {name} | {how} | {generate} | {bytes_of[0]} | {bytes_of[1]} | {why} |"


def page(records: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    found = counts({name: record for name, record in records.items() if "," not in name})
    said = ", ".join(f"{how} {found[how]}" for how in ORDER if how in found)
    rows = "\n".join(_row(name, record) for name, record in sorted(records.items()))
    return f"""{(HERE / "head.md").read_text()}
{sum(found.values())} architectures: {said}. Bytes are those of the tiny models (hidden size 64):
of a token's keys and values, and of what a fork copies when it runs, by rows at 70 tokens.

| architecture | runs by | `generate()` with `apr.Cache` | token | state | why, or why not |
|---|---|---|---|---|---|
{rows}
"""
