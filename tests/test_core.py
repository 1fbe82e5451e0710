"""The core against plain Python lists: a hypothesis state machine, and the rules that it cannot reach."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from apr import _core
from apr.errors import ForeignThread, InvalidInput, OutOfPages, ThreadReleased

PAGE = 16
FAR_TOO_MANY = 1 << 40


def make(pages=4000, can_rotate=True):
    return _core.ThreadTable(pages, PAGE, can_rotate)


def step(table, ids, has_logits=False):
    transaction = _core.Step(table, ids, [has_logits] * len(ids), FAR_TOO_MANY)
    rows = 0
    while transaction.next():
        rows += transaction.plan.num_rows
    transaction.commit()
    return rows


class Model:
    """A thread as plain lists: pieces of (tokens, position of the first), the last one its own tail."""

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
    """fork, extend, step, join, trim, release in any order; every thread is compared after each."""

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
        self.models[self.table.create(tokens)] = model

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
            self.models[child] = model
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
        self.table.join(parent_number, children, positions, reencode)
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

    @invariant()
    def pages_hold_what_is_seen(self):
        encoded = 0
        if not self.models:
            assert self.table.used_pages == 0 and self.table.num_segments == 0
        for number in self.models:
            encoded += self.table.length(number)
        assert self.table.used_pages * PAGE <= encoded + (PAGE + 24 * PAGE) * max(
            self.table.num_segments, 1
        )

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


def test_the_prefix_of_forked_threads_runs_once():
    table = make()
    root = table.create(list(range(50)))
    kids = table.fork(root, 4)
    for i, kid in enumerate(kids):
        table.extend(kid, [i])
    assert step(table, kids) == 50 + 4
    assert table.queued(root) == 0


def test_a_released_writers_queued_tokens_still_run():
    table = make()
    root = table.create(list(range(20)))
    kid = table.fork(root, 1)[0]
    table.release(root)
    table.extend(kid, [1])
    assert step(table, [kid]) == 21
    table.release(kid)
    assert table.used_pages == 0 and table.num_segments == 0


def test_the_parent_writes_on_and_the_child_does_not_see_it():
    table = make()
    root = table.create([1, 2, 3])
    kid = table.fork(root, 1)[0]
    table.extend(root, [4])
    table.extend(kid, [5])
    assert table.tokens(root) == [1, 2, 3, 4] and table.tokens(kid) == [1, 2, 3, 5]
    assert step(table, [kid]) == 4  # three of the root's tokens and its own
    assert table.queued(root) == 1


def test_beam_search_does_not_pile_up_segments():
    """1,000 steps of width 8: views stay at about length / page entries, and no page is left over."""
    import random

    random.seed(0)
    table = make()
    root = table.create(list(range(100)))
    beams = table.fork(root, 8)
    table.release(root)
    for i in range(1000):
        for beam in beams:
            table.extend(beam, [i])
        step(table, beams)
        parents = [random.choice(beams) for _ in range(8)]
        children = [table.fork(p, 1)[0] for p in parents]
        for beam in beams:
            table.release(beam)
        beams = children
    longest = max(len(table.view(b)) for b in beams)
    assert longest <= 1100 / PAGE * 1.25 + 3
    assert table.used_pages <= 8 * (1100 / PAGE + 40)
    for beam in beams:
        assert table.tokens(beam) == list(range(100)) + list(range(1000))
        table.release(beam)
    assert table.used_pages == 0 and table.num_segments == 0


def test_a_short_prompt_of_a_root_stays_shared():
    table = make()
    root = table.create(list(range(7)))
    kids = table.fork(root, 8)
    for kid in kids:
        table.extend(kid, [1])
    transaction = _core.Step(table, kids, [False] * 8, FAR_TOO_MANY)
    transaction.next()
    transaction.commit()
    assert transaction.copied_tokens == 0
    assert all(len(table.view(k)) == 2 for k in kids)


def test_nested_joins_and_regrafted_grandchildren():
    table = make()
    root = table.create([1, 2])
    a, b = table.fork(root, 2)
    table.extend(a, [10, 11, 12])
    table.extend(b, [20])
    grandchild = table.fork(a, 1)[0]
    table.extend(grandchild, [30])
    table.join(root, [b, a], "sum", False)
    assert table.tokens(root) == [1, 2, 20, 10, 11, 12] and table.position(root) == 6
    table.extend(root, [3])
    table.join(root, [grandchild], "max", False)
    # Forked after a's three tokens, which the root reads at 3 to 5: its own stands at 6.
    offsets = [entry[1] for entry in table.view(root)]
    assert table.tokens(root)[-1] == 30 and offsets[-2] == 6
    assert table.position(root) == 7


def test_join_keeps_reserved_positions():
    table = make()
    root = table.create([1, 2])
    a, b = table.fork(root, 2)
    table.extend(a, [10, 11])
    table.extend(b, [20])
    table.join(root, [a, b], "keep", False)
    assert [e[1] for e in table.view(root)] == [0, 2, 2, 4]


def test_trim_below_a_pinned_length_opens_a_new_tail():
    table = make()
    root = table.create(list(range(10)))
    kid = table.fork(root, 1)[0]
    step(table, [root])
    tail = table.tail(root)
    table.trim(root, 4)
    assert table.tail(root) != tail and table.tokens(kid) == list(range(10))
    table.extend(root, [99])
    assert table.tokens(root) == [0, 1, 2, 3, 99] and table.position(root) == 5
    with pytest.raises(ForeignThread, match="trimmed"):
        table.join(root, [kid], "max", False)


def test_trim_in_a_live_region_is_refused():
    table = make()
    region = table.create_region([], 0, 1)
    writer = table.create_with_view([], region, False)
    table.extend(writer, [1, 2, 3])
    step(table, [writer])
    reader = table.create_with_view([(region, None, None, 0, False)], None, False)
    with pytest.raises(InvalidInput, match="still writing"):
        table.trim(reader, 2)
    assert table.length(reader) == 3


def test_a_dependency_freed_by_the_step_itself():
    """A segment that only another one's context holds goes when that context has served."""
    table = make()
    first = table.create_segment([1, 2, 3], 0, [])
    second = table.create_segment([4, 5], 3, [(first, None, None, 0, False)])
    table.release_segment(first)
    reader = table.create_with_view([(second, None, None, 0, False)], None, False)
    table.extend(reader, [7])
    assert step(table, [reader]) == 6
    table.release(reader)
    table.release_segment(second)
    assert table.used_pages == 0
    assert table.num_segments == 0


def test_regions_that_saw_each_other_are_freed():
    """Writers released with a token still queued leave contexts that hold one another."""
    table = make()
    one, two = table.create_region([], 0, 1), table.create_region([], 0, 1)
    a = table.create_with_view([(two, None, None, 0, False)], one, False)
    b = table.create_with_view([(one, None, None, 0, False)], two, False)
    for _ in range(2):
        table.extend(a, [1])
        table.extend(b, [2])
        if table.queued(a) == 1 and not table.segment_encoded(one):
            step(table, [a, b])
    for thread in (a, b):
        table.release(thread)
    for segment in (one, two):
        table.release_segment(segment)
    assert table.used_pages == 0
    assert table.num_segments == 0


def test_a_trim_of_a_regrafted_part_is_noticed():
    table = make()
    parent = table.create(list(range(10)))
    one, two = table.fork(parent, 2)
    table.extend(one, [11] * 5)
    table.extend(two, [12] * 5)
    grandchild = table.fork(two, 1)[0]
    table.join(parent, [one, two], "max", False)
    table.trim(parent, 16)
    with pytest.raises(ForeignThread, match="trimmed"):
        table.join(parent, [grandchild], "max", False)


def test_queued_tokens_of_a_region_left_behind_still_count():
    table = make()
    first, second = table.create_region([], 0, 1), table.create_region([], 3, 1)
    writer = table.create_with_view([], first, False)
    table.extend(writer, [1, 2, 3])
    table.set_writes(writer, second)
    assert table.tokens(writer) == [1, 2, 3]
    with pytest.raises(InvalidInput, match="still has 3 queued"):
        table.create_with_view([], first, False)
    table.extend(writer, [4])
    assert step(table, [writer]) == 4
    other = table.create_with_view([], first, False)
    assert table.tokens(other) == [1, 2, 3]


def test_trim_of_a_view_whose_tail_is_not_last():
    table = make()
    before, after = (table.create_segment(list(range(5)), b, []) for b in (0, 8))
    region = table.create_region([], 5, 1)
    view = [(before, 0, None, 0, False), (region, 5, None, 0, False), (after, 8, None, 0, False)]
    thread = table.create_with_view(view, region, False)
    table.extend(thread, [7, 8, 9])
    table.trim(thread, 11)
    assert table.tokens(thread) == [0, 1, 2, 3, 4, 7, 8, 9, 0, 1, 2]
    transaction = _core.Step(table, [thread], [False], 100)
    assert transaction.next()
    # The queued tokens run, and the last of them gives the logits.
    last = [row for number, row in transaction.logits_rows if number == thread]
    assert [int(transaction.plan.ids[row]) for row in last] == [9]
    transaction.commit()


def test_an_empty_live_region_survives_a_trim():
    table = make()
    prompt, bob = table.create_segment([1, 2, 3], 0, []), table.create_region([], 3, 1)
    own = table.create_region([], 3, 1)
    view = [(prompt, 0, None, 0, False), (bob, None, None, 0, False), (own, None, None, 0, False)]
    thread = table.create_with_view(view, own, False)
    table.extend(thread, [8, 9])
    table.trim(thread, 3)
    assert [entry[0] for entry in table.view(thread)] == [prompt, bob, own]


def test_joins_over_a_growing_prefix_are_refused():
    table = make()
    region = table.create_region([], 0, 1)
    writer = table.create_with_view([], region, False)
    table.extend(writer, [1, 2, 3])
    step(table, [writer])
    parent = table.create_with_view([(region, None, None, 0, False)], None, False)
    child = table.fork(parent, 1)[0]
    table.extend(child, [5, 6])
    table.extend(writer, [4])
    step(table, [writer])
    with pytest.raises(InvalidInput, match="live"):
        table.join(parent, [child], "sum", False)
    table.release(writer)
    table.join(parent, [child], "sum", False)
    assert table.tokens(parent) == [1, 2, 3, 4, 5, 6]
    assert table.position(parent) == 6


def test_a_view_with_a_copied_head_can_be_set_to_itself():
    table = make()
    root = table.create(list(range(40)))
    child = table.fork(root, 1)[0]
    table.extend(child, [50, 51, 52])
    step(table, [child])
    grandchild = table.fork(child, 1)[0]
    table.extend(grandchild, [60])
    step(table, [grandchild])
    assert table.view(grandchild)[-1][3] == -3  # a copied head of three tokens
    table.trim(grandchild, 41)
    table.set_view(grandchild, table.view(grandchild))
    assert table.tokens(grandchild) == [*range(40), 50]


def test_threads_that_see_each_other_are_not_split():
    table = make()
    one, two = table.create_region([], 0, 1), table.create_region([], 0, 1)
    a = table.create_with_view([(two, None, None, 0, False)], one, True)
    b = table.create_with_view([(one, None, None, 0, False)], two, True)
    table.extend(a, [1] * 5)
    table.extend(b, [2] * 5)
    with pytest.raises(InvalidInput, match="step_tokens"):
        _core.Step(table, [a, b], [False, False], 7)
    assert step(table, [a, b]) == 10


def test_a_copy_never_costs_the_last_page():
    table = make(pages=5)
    root = table.create([0] * 16)
    child = table.fork(root, 1)[0]
    table.extend(child, [1] * 15)
    step(table, [child])
    grandchild = table.fork(child, 1)[0]
    blocker = table.create([3] * 32)
    step(table, [blocker])
    table.extend(grandchild, [2, 2])
    step(table, [grandchild])
    assert table.used_pages == 5


def test_one_writer_a_region():
    table = make()
    region = table.create_region([], 0, 1)
    first = table.create_with_view([], region, False)
    with pytest.raises(InvalidInput, match="one writer"):
        table.create_with_view([], region, False)
    table.release(first)
    with pytest.raises(InvalidInput, match="sealed"):
        table.create_with_view([], region, False)


def test_a_step_moves_to_the_common_history_without_copies():
    """Hogwild's end of a step: the tail becomes everybody's, the worker goes on in a new region."""
    table = make()
    first = table.create_region([], 0, 1)
    worker = table.create_with_view([], first, True)
    table.extend(worker, list(range(5)))
    step(table, [worker])
    used = table.used_pages
    second = table.create_region([], 5, 1)
    table.set_writes(worker, second)
    table.seal(first)
    other = table.create_with_view([(first, None, None, 0, False)], None, True)
    assert table.used_pages == used
    assert table.tokens(worker) == table.tokens(other) == list(range(5))
    table.extend(worker, [7])
    step(table, [worker])
    assert table.tokens(worker) == [0, 1, 2, 3, 4, 7]


def test_exhausted_pool_is_taken_back():
    table = make(pages=2)
    root = table.create(list(range(20)))
    step(table, [root])
    table.extend(root, list(range(20)))
    with pytest.raises(OutOfPages, match="exhausted"):
        step(table, [root])
    assert isinstance(OutOfPages(), MemoryError)
    assert table.used_pages == 2 and table.queued(root) == 20
    table.trim(root, 22)
    assert step(table, [root]) == 2


def test_messages_name_the_fault():
    table = make()
    root = table.create([1, 2, 3])
    with pytest.raises(InvalidInput, match="got 0"):
        table.fork(root, 0)
    with pytest.raises(InvalidInput, match="expected 0 to its length 3"):
        table.trim(root, 4)
    other = table.create([1])
    with pytest.raises(ForeignThread, match="not forked"):
        table.join(root, [other], "max", False)
    table.release(other)
    with pytest.raises(ThreadReleased, match="was released"):
        table.extend(other, [1])
    kid = table.fork(root, 1)[0]
    table.join(root, [kid], "max", False)
    with pytest.raises(InvalidInput, match="nothing queued"):
        _core.Step(table, [root], [False], 10)
    with pytest.raises(InvalidInput, match="step_tokens"):
        _core.Step(table, [root], [False], 0)
