"""What a block does to threads and to the record: forks with their first words, and every way to
come back.
"""

from __future__ import annotations

from collections.abc import Sequence

from apr.protocols.grammar import Grammar
from apr.protocols.markers import Watcher, Words
from apr.protocols.record import Seen
from apr.protocols.worker import Block, Worker
from apr.threads.session import Session
from apr.threads.thread import ViewEntry


def fork_child(
    session: Session,
    words: Words,
    grammar: Grammar,
    parent: Worker,
    block: Block,
    n: int,
    outline: str,
) -> Worker:
    """A child with its first words queued; it does not write yet."""
    record, depth = parent.record, parent.depth + 1
    head = words.spell(grammar.filled(grammar.child, n, outline, depth))
    if grammar.context == "fresh":
        start = getattr(words.tokenizer, "bos_token_id", None)
        head = [*([] if start is None else [start]), *head]
        key = (*parent.thread.seed_path, -1 - parent.blocks, n)
        thread = session.thread(request=key)
        piece = record.start([])
        record.pieces[piece].thread = len(record.pieces) - 1
    else:
        thread = parent.thread.fork()[0]
        cut = 0
        if grammar.context == "outline":
            cut = len(parent.thread) - block.head
            thread.trim(block.head)
        own = record.pieces[parent.piece]
        piece = record.after(parent.piece, len(own.ids) - cut, thread=len(record.pieces))
    end = grammar.end
    if end is not None:
        end = "".join(part.text for part in grammar.filled(end, n, outline, depth))
    child = Worker(
        thread,
        parent.request,
        Watcher(words, end),
        piece,
        parent=parent,
        n=n,
        depth=depth,
        outline=outline,
        end=end,
        critical=parent.critical,
        given=len(record.pieces[piece].sees),
        head=len(head),
        inherited=frozenset(e.segment._id for e in thread.view) - {thread.tail._id},
    )
    child.pieces = [piece]
    thread.label = f"child {n}"
    child.put_in(head)
    return child


def close_text(words: Words, grammar: Grammar, worker: Worker, reason: str) -> str:
    """The text of a thread that has ended, without its end word.

    A child whose text will be read by others is closed in the tokens too: an EOS is taken off, a
    missing end word is put in.
    """
    text = words.plain(worker.written())
    if worker.end is not None and reason == "end":
        whole = words.decode(worker.written())  # the EOS, if it is the end word, is not plain text
        return whole[: whole.rindex(worker.end)]
    if worker.parent is None or grammar.returns in ("message", "nothing"):
        return text
    if reason == "eos":
        cut_to(worker, len(worker.thread) - 1)
    if grammar.end is not None:
        parts = grammar.filled(grammar.end, worker.n, worker.outline, worker.depth)
        worker.put_in(words.spell(parts))
    return text


def cut_to(worker: Worker, length: int) -> None:
    """Trim a worker's thread to `length` visible tokens, all in its last piece."""
    removed = len(worker.thread) - length
    worker.thread.trim(length)
    old = worker.piece
    kept = len(worker.record.pieces[old].ids) - removed
    worker.parts = [*worker.parts, Seen(old, kept)]
    worker.move_to(worker.record.after(old, kept, thread=old))


def skip(session: Session, worker: Worker) -> None:
    """Move the token that a worker has just written behind the positions that it leaves to its
    children.
    """
    thread, record, old = worker.thread, worker.record, worker.piece
    token = record.pieces[old].ids[-1]
    thread.trim(len(thread) - 1)
    begin = thread.position + worker.reserved
    tail, view = thread.tail, thread.view
    region = session.region(base=begin)
    thread.view = [*view, (region, begin)]
    thread.writes = region
    tail.seal()
    thread.extend([token])
    worker.move_to(record.parts_after(old, (), begin, thread=old))
    record.move_last(old, worker.piece)
    worker.parts = [*worker.parts, Seen(old, len(record.pieces[old].ids))]
    worker.reserved = 0


def take(
    session: Session,
    words: Words,
    grammar: Grammar,
    parent: Worker,
    block: Block,
    children: Sequence[Worker],
) -> None:
    """Bring the children's results into the parent and put in the words that it goes on from."""
    if grammar.rollback:
        cut_to(parent, block.opened)
    returns = grammar.returns
    if returns == "keep" and children:
        _take_where_written(parent, children)
    elif returns in ("max", "sum") and children:
        _take_keys(parent, children, returns)
    parent.put_in(words.encode(grammar.before))
    if returns == "text":
        for child in children:
            parent.put_in(child.thread.own_tokens)
    elif returns == "message":
        for child in children:
            message = grammar.message_of(child.text, child.request.say)
            lost = grammar.otherwise is not None and not child.succeeded(grammar)
            form = grammar.otherwise if lost and grammar.otherwise is not None else grammar.each
            filled = grammar.filled(form, child.n, child.outline, child.depth, message)
            parent.put_in(words.spell(filled))
    parent.put_in(words.encode(grammar.after))


def _take_keys(parent: Worker, children: Sequence[Worker], positions: str) -> None:
    """Keys and values side by side at the fork, or one after the other."""
    record = parent.record
    cursor = end = parent.thread.position
    parts: list[Seen] = []
    for child in children:
        first = record.pieces[child.pieces[0]].position
        shift = cursor - first if positions == "sum" else 0
        mine = [Seen(p, hi, s + shift) for p, hi, s in child.own_parts()]
        end = max([end, *(record.part_end(part) for part in mine)])
        cursor = end if positions == "sum" else cursor
        parts += mine
    parent.thread.join([child.thread for child in children], positions=positions)
    parent.parts = [*parent.own_parts(), *parts]
    parent.move_to(record.parts_after(parent.piece, parts, end, thread=parent.piece))


def _take_where_written(parent: Worker, children: Sequence[Worker]) -> None:
    """Keys and values at the positions that were reserved for them, behind what the children forked
    from.
    """
    record, thread = parent.record, parent.thread
    entries: list[ViewEntry] = []
    joined: dict[int, list[Seen]] = {}  # by the piece that a child was forked from
    for child in children:
        for entry in child.thread.view:
            if entry.segment._id not in child.inherited:
                length = len(entry.segment) if entry.hi is None else entry.hi
                offset = entry.segment.base if entry.offset is None else entry.offset
                if length:
                    entries.append(ViewEntry(entry.segment, offset, length))
        joined.setdefault(record.pieces[child.pieces[0]].sees[-1].piece, []).extend(
            child.own_parts()
        )
    tails = [child.thread.tail for child in children]
    for child in children:
        child.thread.release()
    for tail in tails:
        if not tail.sealed:
            tail.seal()
    view = thread.view
    thread.view = [*view[:-1], *entries, view[-1]]
    old = parent.piece
    end = record.pieces[old].end
    queued = thread.queued  # a last token that has not run sees what is taken
    parent.move_to(record.parts_after(old, (), end - queued, thread=old))
    for _ in range(queued):
        record.move_last(old, parent.piece)

    def in_place(parts: list[Seen]) -> list[Seen]:
        """Each child's parts behind what it was forked from: the order in which they read."""
        return [p for part in parts for p in (part, *joined.get(part.piece, ()))]

    after = record.pieces[parent.piece]
    after.sees = in_place(after.sees)
    parent.parts = in_place([*parent.parts, Seen(old, len(record.pieces[old].ids))])
