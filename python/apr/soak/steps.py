"""Steps, runs and live regions, each compared with the oracle."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

import apr
from apr.soak.edits import EXPECTED, STEP_TOKENS, Edits, Failure, Tally
from apr.soak.faults import Breaks, Injected, Tears, fault
from apr.soak.oracle import Oracle, Row
from apr.soak.plain import Crew, Item, Writer

Operation = tuple[str, int, int, int, str]  # what; three numbers that say which and how; a fault
TOLERANCE = 1e-3  # of the logits' spread: float32 sums of 32 products, in two layers


def _split(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    return [cell.number for cell, _ in items], [at for _, at in items]


class Player(Edits):
    """All operations."""

    def __init__(self, model: Any, tally: Tally, on_full: str) -> None:
        super().__init__(model, tally, on_full)
        self.oracle = Oracle(model)
        self.crew: Crew | None = None
        self.writers: list[apr.Thread] = []
        self.regions: list[apr.Segment] = []

    def play(self, operation: Operation) -> None:
        """Do one, and compare."""
        name, a, b, c, kind = operation
        self.tally.operations[name] += 1
        if kind != "signal" and name not in ("step", "stream"):
            kind = ""
        getattr(self, "do_" + name.replace(" ", "_"))(a, b, c, kind)

    # ---- live regions ---------------------------------------------------------------------------

    def do_crew(self, a: int, b: int, c: int, kind: str) -> None:
        """A new crew in place of the one that is there."""
        self.crew, self.writers, self.regions = None, [], []
        every, rng = range(2 + a % 2), random.Random(b)
        writers = [
            Writer(i, rng.random() < 0.5, [rng.choice([None, rng.randrange(80)]) for _ in every])
            for i in every
        ]
        self.regions = [self.session.region(base=30 * i) for i in every]
        self.writers = [
            self.session.thread(
                view=list(zip(self.regions, writer.places, strict=True)),
                writes=self.regions[writer.own],
                visibility="current" if writer.current else "previous",
            )
            for writer in writers
        ]
        self.crew = Crew(writers)

    def do_crew_writes(self, a: int, b: int, c: int, kind: str) -> None:
        if self.crew is None:
            return
        i, ids = a % len(self.writers), self.tokens(b, 4)
        if self.writers[i].queued + len(ids) > STEP_TOKENS // 3:
            return
        self.writers[i].extend(ids)
        self.crew.regions[i] += [self.cells.new(token, 0, ()) for token in ids]

    def crew_rows(self, who: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """(writer, row) of what the crew's members have queued."""
        crew = self.crew
        assert crew is not None
        steps = {c.number for i in who for c in crew.regions[i] if not c.run}
        for i in who:
            for j, cell in enumerate(crew.regions[i]):
                if not cell.run:
                    items, at = crew.sees(crew.writers[i], steps, j)
                    yield i, Row(cell.token, at, cell.number, *_split(items))

    # ---- steps ----------------------------------------------------------------------------------

    def wanted(self, numbers: Sequence[int], who: Sequence[int] = ()) -> Any:
        """Logits of lines, and of the crew's members behind them, by the oracle, which keeps the
        cells that it needs.
        """
        rows: list[Row] = []
        last: list[int] = []
        entered: set[int] = set()
        for number in numbers:
            line = self.world.lines[number]
            waiting = [cell for cell, _ in line.items]
            while waiting:
                cell = waiting.pop()
                if cell.number in entered or self.oracle.has(cell.number):
                    continue
                entered.add(cell.number)
                rows.append(Row(cell.token, cell.at, cell.number, *_split(cell.sees)))
                waiting += [seen for seen, _ in cell.sees]
        for number in numbers:
            items = self.world.lines[number].items
            cell, at = items[-1]
            last.append(len(rows))
            rows.append(Row(cell.token, at, None, *_split(items)))
        ends: dict[int, int] = {}
        for i, row in self.crew_rows(who) if who else ():
            ends[i] = len(rows)
            rows.append(row)
        return self.oracle.run(rows)[[*last, *(ends[i] for i in who)]]

    def compare(self, got: torch.Tensor, want: Any) -> None:
        worst = float(np.abs(got.double().numpy() - want).max() / want.std())
        self.tally.rows += len(want)
        self.tally.worst = max(self.tally.worst, worst)
        if not worst <= TOLERANCE:
            raise Failure(f"logits are {worst:.2g} standard deviations off")

    def do_step(self, a: int, b: int, c: int, kind: str) -> None:
        numbers = self.some(a, 6) if self.threads else []
        who: list[int] = []
        if self.crew is not None and b % 2:
            who = [
                i for i in range(len(self.writers)) if self.writers[i].queued and b >> (i + 1) & 1
            ]
        if self.crew is not None and any(self.crew.writers[i].current for i in who):
            numbers = []  # who see each other's tokens of now must run in one forward
        threads = [*(self.threads[n] for n in numbers), *(self.writers[i] for i in who)]
        if not threads:
            return
        if not all(self.world.lines[n].ready for n in numbers):
            full = apr.OutOfPages if self.session.on_full == "offload" else apr.InvalidInput
            return self.refused(lambda: self.session.step(threads), (apr.InvalidInput, full))
        before = self.session.stats.used_pages
        got = self.attempt(lambda: self.session.step(threads), self.world, kind, c)
        ran = all(self.writers[i].queued == 0 for i in who)
        stays = kind != "signal" and self.session.on_full == "raise"  # else pages came back
        if got is None and stays and self.session.stats.used_pages > before:
            raise Failure("a step that was taken back kept pages")
        if got is None and not (ran and who):
            return
        want = self.wanted(numbers, who)
        for i in who:
            for cell in self.crew.regions[i] if self.crew else ():
                cell.run = True
        if got is not None:
            self.compare(got, want)

    def do_stream(self, a: int, b: int, c: int, kind: str) -> None:
        numbers = [n for n in self.some(a, 4) if self.world.lines[n].ready] if self.threads else []
        if not numbers:
            return
        if b % 7 == 3:
            return self.decode_live(numbers, 1 + c % (4 * len(numbers)))
        threads = [self.threads[n] for n in numbers]
        breaks = [Breaks(1 + b % 4)] if b % 5 == 0 else []
        with apr.stream(
            self.session, threads, max_new_tokens=3, do_sample=True, eos_token_id=[],
            logits_processor=breaks,
        ) as run:  # fmt: skip
            for left in (3, 2, 1):
                step = self.one_step(run, numbers, kind if left == 1 + b % 3 else "", c)
                if step is not None:
                    self.compare(*step)

    def decode_live(self, numbers: list[int], fails: int) -> None:
        """A run whose streamer fails: where it does, every thread has taken the same steps."""
        lengths = [len(self.world.lines[n].items) for n in numbers]
        threads, tears = [self.threads[n] for n in numbers], Tears(fails)
        try:
            apr.decode(
                self.session, threads, max_new_tokens=3, do_sample=True, eos_token_id=[],
                streamer=lambda thread: tears,
            )  # fmt: skip
        except EXPECTED as error:
            self.tally.faults["streamer" if isinstance(error, Injected) else "OutOfPages"] += 1
        taken = [thread.tokens[k:] for thread, k in zip(threads, lengths, strict=True)]
        if len({len(tokens) for tokens in taken}) > 1 and self.session.on_full == "raise":
            raise Failure(f"a run whose streamer failed gave its threads {taken}")
        for number, tokens in zip(numbers, taken, strict=True):
            self.world.extend(number, tokens, self.cells)
        if wrong := self.differs(self.world):
            raise Failure(wrong)

    def one_step(self, run: apr.Stream, numbers: list[int], kind: str, where: int) -> Any:
        """A step of a run: its logits, and those wanted; where it is interrupted nobody has taken a
        token, or everybody has.
        """
        lengths = [len(self.world.lines[n].items) for n in numbers]
        with_fault = fault(self.model, kind, where) if kind else nullcontext()
        step = None
        try:
            with with_fault:
                step = next(iter(run))
        except EXPECTED as error:
            self.tally.faults[kind or type(error).__name__] += 1
        except StopIteration:
            return None
        want = self.wanted(numbers)
        taken = [self.threads[n].tokens[k:] for n, k in zip(numbers, lengths, strict=True)]
        writing = [i for i, n in enumerate(numbers) if self.threads[n] not in run.waiting]
        if step is not None:
            writing = [i for i, n in enumerate(numbers) if self.threads[n] in step.tokens]
        counts = [len(tokens) for tokens in taken]
        if len({counts[i] for i in writing}) != 1 or sum(counts) not in (0, len(writing)):
            raise Failure(f"a step of a run gave its threads {taken}")
        for number, tokens in zip(numbers, taken, strict=True):
            self.world.extend(number, tokens, self.cells)
        if wrong := self.differs(self.world):
            raise Failure(wrong)
        return None if step is None else (step.logits, want[writing])

    # ---- files -----------------------------------------------------------------------------------

    def do_save(self, a: int, b: int, c: int, kind: str) -> None:
        """All goes on in another session, which has it from a file."""
        named: dict[str, apr.Thread | apr.Segment] = {}
        named |= {f"line {n}": thread for n, thread in self.threads.items()}
        named |= {f"writer {i}": thread for i, thread in enumerate(self.writers)}
        named |= {f"segment {i}": segment for i, (segment, _) in enumerate(self.segments)}
        named |= {f"region {i}": region for i, region in enumerate(self.regions)}
        if not named:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.session.save(f"{folder}/saved", named)
            except apr.OutOfPages:  # not all of it fits into the pool at once
                if self.session.stats.offloaded_pages:
                    return
                raise
            self.session.close()
            self.session, found = apr.Session.open(f"{folder}/saved", self.model, **self.sizes)
        threads: dict[str, Any] = found
        self.threads = {n: threads[f"line {n}"] for n in self.threads}
        self.writers = [threads[f"writer {i}"] for i in range(len(self.writers))]
        self.segments = [(threads[f"segment {i}"], own) for i, (_, own) in enumerate(self.segments)]
        self.regions = [threads[f"region {i}"] for i in range(len(self.regions))]
        if wrong := self.differs(self.world):
            raise Failure(f"after a save: {wrong}")

    # ---- the end --------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let everything go; nothing may stay."""
        self.session.check()
        self.threads.clear()
        self.segments.clear()
        self.crew, self.writers, self.regions = None, [], []
        core = self.session.table.ask_now()
        left = (core.used_pages, core.num_threads, core.num_segments)
        if left != (0, 0, 0):
            raise Failure(f"pages, threads, segments that stay: {left}")
        self.session.close()
