"""Hogwild! by explicit lists: which token of which block each row sees, at which position, step
after step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from token_loop import Row, TokenLoop


@dataclass
class Writer:
    index: int
    tokens: list[int]  # that it will write
    block: str = ""
    number: int = 1
    taken: int = 0  # of `tokens`
    since_check: int = 0
    view: list[str] = field(default_factory=list)  # blocks before its own
    pending: list[tuple[str, int, list[str]]] = field(
        default_factory=list
    )  # block, token, view then
    logprobs: list[float] = field(default_factory=list)


class HogwildLoop:
    """The rules of a team, restated; `run` gives the log-probabilities of what each writer
    wrote.
    """

    def __init__(self, model, family, prompt, board, layout, check_every):
        self.loop = TokenLoop(model, family)
        self.board, self.layout, self.check_every = board, layout, check_every
        self.blocks: dict[str, list[int]] = {}
        self.history: list[str] = []
        self.live: list[Writer] = []
        self.everyone: list[Writer] = []
        head = [*prompt, *(board.past if layout != "contiguous" else [])]
        for i, token in enumerate(head):
            self.blocks.setdefault("head", []).append(token)
            self.loop.step([Row("head", token, i, [("head", 0, i + 1)])])
        self.headers = {"others": board.others if layout != "interleaved" else [], "own": board.own}
        for name, ids in self.headers.items():
            for i, token in enumerate(ids):
                self.blocks.setdefault(name, []).append(token)
                sees = [("head", 0, len(head)), (name, len(head), i + 1)]
                self.loop.step([Row(name, token, len(head) + i, sees)])

    def _view(self, writer):
        shown = [name for name in ("others",) if self.headers["others"]]
        own = ["own"] if self.headers["own"] else []
        theirs = [w.block for w in self.everyone if w is not writer]
        if self.layout == "contiguous":
            return ["head", *shown, *theirs, *own]
        if self.layout == "interleaved":
            return ["head", *self.history, *own]
        return ["head", *self.history, *shown, *[b for b in theirs if b not in self.history], *own]

    def _show(self):
        for writer in self.live:
            writer.view = self._view(writer)

    def enter(self, tokens):
        writer = Writer(len(self.everyone), tokens)
        writer.block = f"{writer.index}.1"
        self.blocks[writer.block] = []
        self.everyone.append(writer)
        self.live.append(writer)
        self._show()
        self._queue(writer, self.board.step(writer.index, 1))
        return writer

    def _queue(self, writer, tokens):
        writer.pending += [(writer.block, token, None) for token in tokens]

    def leave(self, writer):
        self.live.remove(writer)
        writer.pending = [(b, t, list(writer.view)) for b, t, _ in writer.pending]
        if self.layout != "contiguous":
            self.history.append(writer.block)
        self._show()

    def step(self):
        """All pending tokens are written, then each sees what its view lists, this step's tokens
        too.
        """
        todo = [(w, *p) for w in self.everyone for p in w.pending]
        places = []
        for _, block, token, _ in todo:
            self.blocks[block].append(token)
            places.append(len(self.blocks[block]) - 1)
        rows = []
        for (writer, block, token, view), place in zip(todo, places, strict=True):
            at, sees = 0, []
            for name in writer.view if view is None else view:
                if name != block:
                    sees.append((name, at, len(self.blocks[name])))
                    at += len(self.blocks[name])
            rows.append(Row(block, token, at + place, [*sees, (block, at, place + 1)]))
        logits = self.loop.step(rows)
        last = {id(writer): logits[i] for i, (writer, *_) in enumerate(todo)}
        for writer in self.everyone:
            writer.pending = []
        moving, ended = [], []
        for writer in self.live:
            token = writer.tokens[writer.taken]
            writer.logprobs.append(float(last[id(writer)].log_softmax(-1)[token]))
            writer.taken += 1
            writer.since_check += 1
            self._queue(writer, [token])
            if writer.taken == len(writer.tokens):
                ended.append(writer)
            elif [token] == list(self.board.end):
                moving.append(writer)
        for writer in moving:
            self._turn_page(writer)
        if moving:
            self._show()
        for writer in ended:
            self.leave(writer)

    def _turn_page(self, writer):
        check = self.check_every and writer.since_check >= self.check_every
        writer.number += 1
        if check:
            writer.since_check = 0
        if self.layout != "contiguous":
            writer.pending = [(b, t, list(writer.view)) for b, t, _ in writer.pending]
            self.history.append(writer.block)
            writer.block = f"{writer.index}.{writer.number}"
            self.blocks[writer.block] = []
        begin = [
            *self.board.step(writer.index, writer.number),
            *(self.board.check if check else []),
        ]
        self._queue(writer, begin)
