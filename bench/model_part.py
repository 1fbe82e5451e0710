"""What makes the model's own part of a step faster on a CPU: dtypes, torchao's weight-only
quantisation, torch.compile. docs/performance.md has its figures.

python bench/model_part.py OUT.json [WAY ...]      wants torchao for int8 and int4
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import apr
from apr.bench.harness import Machine
from apr.bench.loop import half_billion


def quantized(name: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        import torchao.quantization as ao

        config = {"int8": ao.Int8WeightOnlyConfig, "int4": ao.IntxWeightOnlyConfig}[name]
        options = {"weight_dtype": torch.int4} if name == "int4" else {}
        ao.quantize_(model, config(**options))
        return model

    return make


def compiled(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        torch._inductor.config.freezing = True  # weights are packed once, as the library reads them
        return torch.compile(before(model))

    return make


WAYS: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model,
    "float32": lambda model: model.float(),
    "int8 weights": quantized("int8"),
    "int4 weights": quantized("int4"),
    "bfloat16, torch.compile": compiled(lambda model: model),
    "int8 weights, torch.compile": compiled(quantized("int8")),
}


def steps(model: Any, threads: int, rounds: int = 12) -> list[float]:
    """Milliseconds of steps of `threads` on 512 shared tokens."""
    with apr.Session(model, max_tokens=512 + threads * 128) as session:
        kids = session.thread([(7 * i) % 1000 for i in range(512)]).fork(threads)
        session.step(kids)
        times = []
        for step in range(rounds):
            for kid in kids:
                kid.extend([step + 3])
            began = time.perf_counter()
            session.step(kids)
            times.append(1e3 * (time.perf_counter() - began))
    return times[3:]


def main() -> None:
    out, *asked = sys.argv[1:]
    machine, rows = Machine(), []
    print(machine)
    for name in asked or WAYS:
        began = time.perf_counter()
        try:
            model = WAYS[name](half_billion())
            found = {n: steps(model, n) for n in (1, 16)}
        except Exception as error:
            print(f"{name}: does not run here: {type(error).__name__}: {str(error)[:300]}")
            continue
        ready = time.perf_counter() - began
        for threads, times in found.items():
            rows.append(
                {
                    "name": name,
                    "threads": threads,
                    "median_ms": round(statistics.median(times), 1),
                    "min_ms": round(min(times), 1),
                    "max_ms": round(max(times), 1),
                    "ready_s": round(ready, 1),
                }
            )
            print(rows[-1], flush=True)
        torch.compiler.reset()
        Path(out).write_text(
            json.dumps({"machine": asdict(machine), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
