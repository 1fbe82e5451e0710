"""Every architecture of AutoModelForCausalLM, tiny, against itself.

    python tools/coverage                     all of them, about 4 minutes on two cores
    python tools/coverage llama qwen3_next    some
    python tools/coverage --part 2/5          every fifth, for CI
    python tools/coverage --update            all, and write baseline.json and docs/models.md anew

Exit status 1 where something is wrong, or worse than in the baseline.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import examine
import report
import tiny

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "baseline.json"
SECONDS = 90  # for one architecture
BYTES = 8 << 30  # address space of a child
BATCH = 12  # architectures of one child


def child(names: list[str]) -> None:
    """Examine `names` here, and print a record a line."""
    import torch
    import transformers

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.CRITICAL)

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for name in names:
        began = time.time()
        signal.alarm(SECONDS)
        try:
            record = examine.examine_twice(name)
        except Exception as error:  # whatever it is, the others go on
            record = {"name": name, "how": "refused", "stopped": f"{type(error).__name__}: {error}"}
        signal.alarm(0)
        record["seconds"] = round(time.time() - began, 1)
        print(json.dumps(record), flush=True)


def run(names: list[str]) -> dict[str, dict[str, Any]]:
    """Records of `names`, by children, two at a time; one that dies takes its first name along."""
    found: dict[str, dict[str, Any]] = {}

    def batch(part: list[str]) -> None:
        while part:
            command = [sys.executable, str(HERE), "--child", *part]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    record = json.loads(line)
                    found[record["name"]] = record
            part = [name for name in part if name not in found]
            if part:
                why = f"the process ended with {done.returncode}: {done.stderr[-300:]}"
                found[part[0]] = {"name": part[0], "how": "refused", "stopped": why}
                part = part[1:]
            print(f"{len(found)}/{len(names)}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(2) as pool:
        parts = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
        list(pool.map(batch, parts))
    return {name: found[name] for name in names}


def worse(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What an architecture did before and does not do now."""
    rank = report.ORDER.index
    if rank(now["how"]) > rank(before["how"]):
        return [f"was run by {before['how']}, and is now {now['how']}: {now.get('why', '')[:200]}"]
    gone = [n for n in examine.CHECKS if before.get(n) is not None and now.get(n) is None]
    return [f"{name}: applied before" for name in gone]


def main() -> int:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="architectures; all of them by default")
    parser.add_argument(
        "--part", default="1/1", help="which part of how many, e.g. 2/3; 0/3: today's"
    )
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.names)
        return 0
    part, parts = map(int, options.part.split("/"))
    part = part or 1 + time.gmtime().tm_yday % parts
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    everything = [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *tiny.VARIED]
    names = options.names or everything[part - 1 :: parts]
    records = run(names)
    before = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    bad = 0
    for name, record in records.items():
        lines = examine.faults(record)
        lines += worse(record, before[name]) if name in before and not options.update else []
        for line in lines:
            print(f"{name}: {line}")
        bad += bool(lines)
    if options.update:
        kept = {n: {k: v for k, v in r.items() if k != "seconds"} for n, r in records.items()}
        before = before | kept
        rows = ",\n".join(f"{json.dumps(n)}: {json.dumps(r)}" for n, r in sorted(before.items()))
        BASELINE.write_text(f"{{\n{rows}\n}}\n")
        report.PAGE.write_text(report.page(before))
    print(report.counts(records), f"{bad} wrong or worse")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
