"""The core against plain Python lists: a hypothesis state machine over random edits."""

from __future__ import annotations

import copy

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apr import _core
from core_table import PAGE, make, step


class Model:
    """A thread as plain lists: pieces of (tokens, position of the first), the last one its own
    tail.
    """

    def __init__(self, pieces, tail_at):
        self.pieces = pieces
        self.tail, self.tail_at = [], tail_at
        self.own = []
        self.parent = None
        self.fork_token = None  # last inherited token
        self.fork_position = 0
        self.fork_shift = 0
        self.inherited = 0  # pieces that came with the fork
        self.joinable = False

    @property
    def tokens(self):
        return [t for piece, _ in self.pieces for t in piece] + self.tail

    @property
    def position(self):
        return self.tail_at + len(self.tail)

    @property
    def own_part(self):
        part = [p for p in self.pieces[self.inherited :] if p[0]]
        return part + ([(list(self.tail), self.tail_at)] if self.tail else [])


class Machine(RuleBasedStateMachine):
    """fork, extend, step, join, trim, drop, release in any order; every thread is compared after
    each.
    """

    def __init__(self):
        super().__init__()
        self.table = make()
        self.models = {}
        self.token = 0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.models)))

    def fresh(self, n):
        self.token += n
        return list(range(self.token - n, self.token))

    @rule(n=st.integers(0, 40))
    def create(self, n):
        if len(self.models) > 12:
            return
        tokens = self.fresh(n)
        model = Model([], 0)
        model.tail, model.own = list(tokens), list(tokens)
        self.models[self.table.create(tokens).number] = model

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.integers(1, 40))
    def extend(self, data, n):
        number = self.pick(data)
        tokens = self.fresh(n)
        self.table.extend(number, tokens)
        self.models[number].tail += tokens
        self.models[number].own += tokens

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def run(self, data):
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.models)), min_size=1, unique=True))
        numbers = [n for n in numbers if self.table.queued(n)]
        if numbers:
            step(self.table, numbers)
            assert all(self.table.queued(n) == 0 for n in numbers)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def fail(self, data):
        """A rolled back step changes nothing."""
        numbers = [n for n in self.models if self.table.queued(n)]
        if numbers:
            before = self.table.used_pages
            views = {n: self.table.view(n) for n in self.models}
            chunks = data.draw(st.integers(0, 2))
            transaction = _core.Step(self.table, numbers, [False] * len(numbers), 7)
            for _ in range(chunks):
                transaction.next()
            transaction.rollback()
            assert self.table.used_pages == before
            assert views == {n: self.table.view(n) for n in self.models}

    @precondition(lambda self: self.models)
    @rule(data=st.data(), n=st.integers(1, 3))
    def fork(self, data, n):
        if len(self.models) > 24:
            return
        number = self.pick(data)
        parent = self.models[number]
        used = self.table.used_pages
        for child in self.table.fork(number, n):
            pieces = copy.deepcopy(parent.pieces)
            if parent.tail:
                pieces.append((list(parent.tail), parent.tail_at))
            model = Model(pieces, parent.position)
            model.parent, model.joinable = number, True
            model.fork_position = parent.position
            model.fork_token = parent.tokens[-1] if parent.tokens else None
            model.inherited = len(pieces)
            self.models[child.number] = model
        assert self.table.used_pages == used

    @precondition(lambda self: any(m.joinable for m in self.models.values()))
    @rule(data=st.data(), positions=st.sampled_from(["max", "sum"]), reencode=st.booleans())
    def join(self, data, positions, reencode):
        families = {}
        for number, model in self.models.items():
            if model.joinable:
                families.setdefault(model.parent, []).append(number)
        parent_number = data.draw(st.sampled_from(sorted(families)))
        children = data.draw(
            st.lists(st.sampled_from(families[parent_number]), min_size=1, unique=True)
        )
        parent = self.models[parent_number]
        how = _core.JoinPositions.__members__[positions]
        self.table.join(parent_number, children, how, reencode)
        if reencode:
            shifts, ends = [], []
            for child in children:
                text = [t for piece, _ in self.models[child].own_part for t in piece]
                shifts.append(parent.position - self.models[child].fork_position)
                ends.append(text[-1] if text else None)
                parent.tail += text
                parent.own += text
        else:
            cursor, joined, shifts = parent.position, [], []
            for child in children:
                model = self.models[child]
                shift = cursor - model.fork_position if positions == "sum" else model.fork_shift
                shifts.append(shift)
                end = cursor
                for piece, at in model.own_part:
                    joined.append((piece, at + shift))
                    end = max(end, at + shift + len(piece))
                cursor = max(cursor, end)
            if parent.tail:
                parent.pieces.append((parent.tail, parent.tail_at))
            parent.pieces += joined
            parent.tail, parent.tail_at = [], cursor
        for i, child in enumerate(children):
            del self.models[child]
            for model in self.models.values():
                if model.parent == child:
                    model.parent = parent_number
                    model.fork_shift += shifts[i]
                    if reencode and ends[i] is not None:
                        model.fork_token = ends[i]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def trim(self, data):
        number = self.pick(data)
        model = self.models[number]
        n = data.draw(st.integers(0, len(model.tokens)))
        total = len(model.tokens)
        self.table.trim(number, n)
        if n == total:
            return
        kept, left = [], n
        before = sum(len(p) for p, _ in model.pieces)
        inherited_tokens = sum(len(p) for p, _ in model.pieces[: model.inherited])
        if n >= before:
            del model.tail[n - before :]
        else:
            for piece, at in model.pieces:
                if left > 0:
                    kept.append((piece[:left], at))
                left -= min(left, len(piece))
            model.inherited = min(model.inherited, len(kept))
            model.pieces = kept
            model.tail = []
            model.tail_at = max((at + len(p) for p, at in kept), default=0)
        if n < inherited_tokens:
            model.fork_position = min(model.fork_position, model.tail_at)
            model.fork_token = model.tokens[-1] if model.tokens else None
        for child in self.models.values():
            if child.parent == number and child.fork_token not in (None, *model.tokens):
                child.joinable = False
        model.own = [t for t in model.own if t in set(model.tokens)]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def drop(self, data):
        number = self.pick(data)
        model = self.models[number]
        total = len(model.tokens)
        start = data.draw(st.integers(0, total))
        stop = data.draw(st.integers(start, total))
        if stop == total:
            return  # a trim
        self.table.drop(number, start, stop)
        if start == stop:
            return
        pieces = [*model.pieces, (model.tail, model.tail_at)]
        before, behind, gone, n = [], [], [], 0
        inherited = [0, 0]
        for i, (piece, at) in enumerate(pieces):
            first = min(max(start - n, 0), len(piece))
            last = min(max(stop - n, 0), len(piece))
            n += len(piece)
            is_tail = i == len(model.pieces)
            gone += [at + j for j in range(first, last)]
            if first > 0 and not (is_tail and first == last):
                before.append((piece[:first], at))
                inherited[0] += i < model.inherited
            if last < len(piece) and not is_tail and last >= first and n > stop:
                behind.append((piece[last:], at + last))
                inherited[1] += i < model.inherited
        tail, at = pieces[-1]
        uncut = total - len(tail) >= stop
        rest = tail if uncut else tail[len(tail) - (total - stop) :]
        rest_at = at + len(tail) - len(rest)
        end = max((at + len(p) for p, at in before), default=0)
        gap_end = max(gone) + 1
        firsts = [at for _, at in behind] + ([rest_at] if rest else [])
        closed = max(0, min(gap_end, *firsts) - end)

        def moved(position):
            return position - closed if position >= gap_end else min(position, end)

        model.pieces = before + [(p, at - closed) for p, at in behind]
        after = max((at + len(p) for p, at in model.pieces), default=0)
        model.tail, model.tail_at = list(rest), rest_at - closed if rest else after
        model.inherited = sum(inherited)
        model.own = [t for t in model.own if t in set(model.tokens)]
        fork_position = model.fork_position
        model.fork_position = moved(fork_position)
        model.fork_shift += fork_position - model.fork_position
        for child in self.models.values():
            if child.parent == number:
                position = child.fork_position + child.fork_shift
                child.fork_shift += moved(position) - position
                if child.fork_token not in (None, *model.tokens):
                    child.joinable = False

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def release(self, data):
        number = self.pick(data)
        self.table.release(number)
        del self.models[number]
        for model in self.models.values():
            if model.parent == number:
                model.parent, model.joinable = None, False

    @invariant()
    def same_as_the_lists(self):
        for number, model in self.models.items():
            assert self.table.tokens(number) == model.tokens
            assert self.table.own_tokens(number) == model.own
            assert self.table.length(number) == len(model.tokens)
            assert self.table.position(number) == model.position
        assert self.table.num_threads == len(self.models)
        assert self.table.check(0) == []

    @invariant()
    def pages_hold_what_is_stored(self):
        """Less than a page is wasted per segment, and nothing outlives its last view."""
        stored, seen, *_ = self.table.sharing()
        assert self.table.used_pages * PAGE <= stored + PAGE * self.table.num_segments
        assert seen <= sum(len(m.tokens) for m in self.models.values())
        if not self.models:
            assert self.table.used_pages == 0
            assert self.table.num_segments == 0

    def teardown(self):
        for number in list(self.models):
            self.table.release(number)
        assert self.table.used_pages == 0
        assert self.table.num_segments == 0


Machine.TestCase.settings = settings(
    max_examples=2000,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase
