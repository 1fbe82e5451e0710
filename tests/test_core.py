"""The core's rules one by one: what the state machine of test_core_machine.py cannot reach."""

from __future__ import annotations

import random

import pytest

from apr import _core
from apr.errors import ForeignThread, InvalidInput, OutOfPages, ThreadReleased
from core_table import FAR_TOO_MANY, PAGE, make, step


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
    """1,000 steps of width 8: views stay at about length / page entries, and no page is left
    over.
    """
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
    table.join(root, [b, a], _core.JoinPositions.sum, False)
    assert table.tokens(root) == [1, 2, 20, 10, 11, 12] and table.position(root) == 6
    table.extend(root, [3])
    table.join(root, [grandchild], _core.JoinPositions.max, False)
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
    table.join(root, [a, b], _core.JoinPositions.keep, False)
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
        table.join(root, [kid], _core.JoinPositions.max, False)


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
    del first
    table.release_dropped()
    reader = table.create_with_view([(second, None, None, 0, False)], None, False)
    table.extend(reader, [7])
    assert step(table, [reader]) == 6
    del reader, second
    table.release_dropped()
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
    del one, two
    table.release_dropped()
    assert table.used_pages == 0
    assert table.num_segments == 0


def test_flags_are_one_a_thread():
    table = make()
    threads = [table.create([1]), table.create([2])]
    with pytest.raises(InvalidInput, match="got 0 flags for 2 threads"):
        _core.Step(table, threads, [], 10)
    with pytest.raises(InvalidInput, match="got no threads"):
        _core.ViewTables().refresh(table, [])


CHAIN = 50_000


def chain(table, count):
    """Segments of a token each, each encoded after the one before: [ids]."""
    ids = [table.create_segment([0], 0, [])]
    for i in range(1, count):
        ids.append(table.create_segment([i % 50], i, [(ids[-1], None, None, 0, False)]))
    return ids


def test_a_chain_of_any_length_runs():
    """A recursion would end the process here."""
    table = make(pages=CHAIN + 8)
    ids = chain(table, CHAIN)
    reader = table.create_with_view([(ids[-1], None, None, 0, False)], None, False)
    table.extend(reader, [7])
    assert step(table, [reader]) == CHAIN + 1


@pytest.mark.parametrize("order", ["oldest first", "newest first", "any"])
def test_a_chain_of_any_length_is_let_go(order):
    """A sweep over all segments for each would take a quarter of an hour."""
    table = make(pages=CHAIN + 8)
    ids = chain(table, CHAIN)
    if order == "newest first":
        ids.reverse()
    if order == "any":
        random.Random(0).shuffle(ids)
    for i in range(CHAIN):
        ids[i] = None
    table.release_dropped()
    assert table.used_pages == 0 and table.num_segments == 0


def test_a_long_ring_is_let_go_as_one():
    """Each is held by another's context until the last handle goes."""
    table = make(pages=4096)
    ids = chain(table, 1000)
    regions = [table.create_region([], 0, 1) for _ in range(2)]
    writers = [
        table.create_with_view(
            [(other, None, None, 0, False), (ids[-1], None, None, 0, False)], region, False
        )
        for region, other in (regions, regions[::-1])
    ]
    for writer in writers:
        table.extend(writer, [1])
    first, last = regions
    del ids, regions, writers, writer, first
    table.release_dropped()
    assert table.num_segments == 1002
    del last
    table.release_dropped()
    assert table.used_pages == 0 and table.num_segments == 0


def test_a_trim_of_a_regrafted_part_is_noticed():
    table = make()
    parent = table.create(list(range(10)))
    one, two = table.fork(parent, 2)
    table.extend(one, [11] * 5)
    table.extend(two, [12] * 5)
    grandchild = table.fork(two, 1)[0]
    table.join(parent, [one, two], _core.JoinPositions.max, False)
    table.trim(parent, 16)
    with pytest.raises(ForeignThread, match="trimmed"):
        table.join(parent, [grandchild], _core.JoinPositions.max, False)


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
    last = [row for number, row in transaction.logits_rows if number == thread.number]
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
    assert [entry[0] for entry in table.view(thread)] == [prompt.number, bob.number, own.number]


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
        table.join(parent, [child], _core.JoinPositions.sum, False)
    table.release(writer)
    table.join(parent, [child], _core.JoinPositions.sum, False)
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
        table.join(root, [other], _core.JoinPositions.max, False)
    table.release(other)
    with pytest.raises(ThreadReleased, match="was released"):
        table.extend(other, [1])
    kid = table.fork(root, 1)[0]
    table.join(root, [kid], _core.JoinPositions.max, False)
    with pytest.raises(InvalidInput, match="nothing queued"):
        _core.Step(table, [root], [False], 10)
    with pytest.raises(InvalidInput, match="step_tokens"):
        _core.Step(table, [root], [False], 0)


@pytest.mark.parametrize(("parent_keeps", "joinable"), [(22, True), (21, False)])
def test_a_fork_point_among_copied_tokens_is_where_they_were_written(parent_keeps, joinable):
    """A child that copied its parent's short tail, trimmed into the copy, joins a parent that still
    sees the token.
    """
    table = make()
    root = table.create(list(range(20)))
    step(table, [root])
    parent = table.fork(root, 1)[0]
    table.extend(parent, [20, 21, 22])
    step(table, [parent])
    child = table.fork(parent, 1)[0]
    table.extend(child, [30, 31])
    step(table, [child])
    assert table.view(child)[-1][3] == -3  # copied
    table.trim(child, 22)
    table.extend(child, [40])
    table.trim(parent, parent_keeps)
    if joinable:
        table.join(parent, [child], _core.JoinPositions.sum, False)
        assert table.tokens(parent) == [*range(22), 40] and table.position(parent) == 23
    else:
        with pytest.raises(ForeignThread, match="trimmed"):
            table.join(parent, [child], _core.JoinPositions.sum, False)
