"""Calls of the core's tables and of `apr.ops` with whatever arguments, in child processes: none may
end one.

    python tools/fuzz.py --calls 100000
"""

from __future__ import annotations

import argparse
import mmap
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from apr import _core, ops

EACH = 5000  # calls of a child
NUMBERS = (0, 1, -1, 2, 3, 16, 17, 63, 64, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 62)
ODD = (None, "x", 1.5, float("nan"), [], (), {}, b"", True, object(), 1 << 70)
METHODS = [
    name
    for name in dir(_core.ThreadTable)
    if not name.startswith("_") and callable(getattr(_core.ThreadTable, name))
]


class Fuzzer:
    """Objects that calls made, and arguments out of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.fresh()

    def fresh(self) -> None:
        """A small table with a few threads and segments."""
        self.table = _core.ThreadTable(self.rng.choice((1, 8, 300)), 16, self.rng.random() < 0.8)
        if self.rng.random() < 0.2:
            self.table.keep_states(self.rng.choice((0, 3)), self.rng.random() < 0.3)
        self.made: list[Any] = []
        self.steps: list[Any] = []
        self.views = _core.ViewTables()
        for _ in range(3):
            self.made.append(self.table.create(self.tokens()))

    def tokens(self) -> list[int]:
        return [self.rng.randrange(100) for _ in range(self.rng.randrange(40))]

    def number(self) -> Any:
        r = self.rng.random()
        if r < 0.55:
            return self.rng.randrange(12)
        if r < 0.75 and self.made:
            return self.rng.choice(self.made)
        return self.rng.choice(NUMBERS) if r < 0.93 else self.rng.choice(ODD)

    def entry(self) -> Any:
        r = self.rng
        return (
            self.number(),
            r.choice((None, 0, 5, self.number())),
            r.choice((None, 1, 3, self.number())),
            r.choice((0, 0, 0, self.number())),
            r.random() < 0.2,
        )

    def some(self, make: Callable[[], Any]) -> list[Any]:
        return [make() for _ in range(self.rng.randrange(4))]

    def argument(self) -> Any:
        r = self.rng.random()
        if r < 0.45:
            return self.number()
        makers = (
            self.tokens,
            lambda: self.some(self.number),
            lambda: self.some(self.entry),
            lambda: [bool(self.rng.randrange(2)) for _ in range(self.rng.randrange(4))],
            lambda: self.rng.choice(list(_core.JoinPositions.__members__.values())),
            lambda: bool(self.rng.randrange(2)),
            lambda: self.table,
        )
        return self.rng.choice(makers)() if r < 0.97 else self.rng.choice(ODD)

    def call(self) -> None:
        """One call; what it makes is kept for others."""
        r = self.rng.random()
        if r < 0.02:
            return self.fresh()
        if r < 0.06 and self.made:
            self.made.pop(self.rng.randrange(len(self.made)))
            return None
        if r < 0.62:
            return self.table_call()
        if r < 0.86:
            return self.step_call()
        return self.ops_call()

    def table_call(self) -> None:
        name = self.rng.choice(METHODS)
        shapes: dict[str, Callable[[], list[Any]]] = {
            "fork": lambda: [self.number(), self.rng.choice((1, 2, self.number()))],
            "extend": lambda: [self.number(), self.tokens()],
            "create": lambda: [self.tokens()],
            "create_region": lambda: [self.tokens(), self.number(), self.rng.choice((1, 2))],
            "create_segment": lambda: [self.tokens(), self.number(), self.some(self.entry)],
            "create_with_view": lambda: [
                self.some(self.entry), self.rng.choice((None, self.number())), False, self.tokens()
            ],
            "join": lambda: [
                self.number(), self.some(self.number), self.argument(), self.rng.random() < 0.4
            ],
            "set_view": lambda: [self.number(), self.some(self.entry)],
            "keep_states": lambda: [0, False],
        }  # fmt: skip
        if name in shapes and self.rng.random() < 0.85:
            arguments = shapes[name]()
        else:
            arguments = [self.argument() for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3)))]
        if name == "keep_states":  # asked of a new table alone
            return
        out = getattr(self.table, name)(*arguments)
        self.made += out[:8] if isinstance(out, list) and name == "fork" else []
        if name.startswith(("create", "hold")):
            self.made.append(out)

    def step_call(self) -> None:
        r = self.rng.random()
        if r < 0.5 or not self.steps:
            threads = self.some(self.number)
            flags = [bool(self.rng.randrange(2)) for _ in threads] if r < 0.45 else [True]
            budget = self.rng.choice((1, 7, 1000, self.number()))
            self.steps = [*self.steps[-2:], _core.Step(self.table, threads, flags, budget)]
            return
        step = self.rng.choice(self.steps)
        name = self.rng.choice(("next", "next", "commit", "rollback", "plan", "logits_rows"))
        if r < 0.75:
            while step.next():
                self.look(step.plan)
            step.commit()
        elif name in ("plan", "logits_rows"):
            self.look(step.plan) if name == "plan" else step.logits_rows
        else:
            getattr(step, name)()
        if r > 0.97:
            self.view_calls()

    def view_calls(self) -> None:
        """What a replayed step does, and any other order of it, on any table."""
        if self.views.refresh(self.table, self.some(self.number)):
            self.views.name_ends(self.table)
        for _ in range(self.rng.randrange(3)):
            table = self.table if self.rng.random() < 0.8 else _core.ThreadTable(8, 16, True)
            getattr(self.views, self.rng.choice(("commit", "commit", "forget", "name_ends")))(table)

    def look(self, plan: Any) -> None:
        for name in ("ids", "positions", "slots", "writers", "rotations", "copies", "pages_needed"):
            getattr(plan, name)
        self.attend(plan)

    def attend(self, plan: Any) -> None:
        """The kernels by this plan, in a pool that may not be the right one."""
        pages = self.rng.choice((1, 8, 300))
        size, heads = self.rng.choice((16, 16, 32)), self.rng.choice((1, 2))
        kept = self.rng.choice((None, None, torch.int8, torch.float8_e4m3fn))
        pool = ops.empty_pool(pages, heads, 8, torch.float32, page_size=size, kv_dtype=kept)
        mine = ops.Plan(plan)
        rows = self.rng.choice((plan.num_rows, plan.num_rows, 1))
        k = torch.randn(rows, heads, 8)
        ops.append(k, k, pool, mine)
        ops.attention(torch.randn(rows, self.rng.choice((2, 4, 3)), 8), pool, mine, 0.3)

    def ops_call(self) -> None:
        rng = self.rng
        shape = [rng.choice((0, 1, 2, 5, 16)) for _ in range(rng.choice((1, 2, 3, 4)))]
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool))
        x = torch.zeros(shape, dtype=dtype)
        if rng.random() < 0.3 and x.ndim > 1:
            x = x.transpose(0, -1)
        if rng.random() < 0.1:
            x = x.to("meta")
        which = rng.randrange(4)
        if which == 0:
            ops.sample(x, ops.Draws(rng.choice((0, 1, 2, 5)), temperature=rng.choice((0.0, 1.0))))
        elif which == 1:
            ops.merge(x, x, x, x)
        elif which == 2:
            sizes = [rng.choice((0, 1, 16, self.number())) for _ in range(3)]
            ops.empty_pool(*sizes, dtype, kv_dtype=rng.choice((None, torch.int8, dtype)))
        else:
            ops.Draws(rng.choice((0, 3)), top_k=rng.choice((0, 5, -1, None)), top_p=self.number())


def child(seed: int, calls: int, note: str) -> None:
    """Make calls; what is about to be made stands in a file that outlives the process."""
    torch.set_num_threads(1)
    if seed % 3 == 0 and _core.gpu(True) is not None:
        _core.force_instruction_set("cuda_emulated")
    fuzzer = Fuzzer(seed)
    with open(note, "r+b") as file, mmap.mmap(file.fileno(), 16) as now:
        for i in range(calls):
            now[:16] = f"{i:<16}".encode()
            try:
                fuzzer.call()
                fuzzer.outcomes["returned"] += 1
            except Exception as error:
                fuzzer.outcomes[type(error).__name__] += 1
    print(dict(fuzzer.outcomes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.seed, options.calls, options.child)
    outcomes: Counter[str] = Counter()
    crashes = 0
    with tempfile.NamedTemporaryFile() as note:
        for seed in range(options.seed, options.seed + -(-options.calls // EACH)):
            note.seek(0)
            note.write(b" " * 16)
            note.flush()
            command = [sys.executable, __file__, "--child", note.name]
            command += ["--seed", str(seed), "--calls", str(EACH)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode == 0:
                outcomes.update(eval(done.stdout.splitlines()[-1]))
                continue
            crashes += 1
            note.seek(0)
            print(f"seed {seed}: {done.returncode} at call {note.read().decode()}", file=sys.stderr)
            print(done.stderr[-500:], file=sys.stderr)
    told = ", ".join(f"{name} {times}" for name, times in outcomes.most_common())
    print(f"{sum(outcomes.values())} calls: {told}; processes that ended: {crashes}")
    raise SystemExit(crashes > 0)


if __name__ == "__main__":
    main()
