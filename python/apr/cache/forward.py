"""A [batch, tokens] forward on threads: what it changes until it is confirmed, and its
attention.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apr import ops
from apr.cache.call import Call
from apr.errors import Error, InvalidInput
from apr.hf.interface import Running
from apr.hf.packed import PackedForward
from apr.ops.device import Copies
from apr.threads.session import Session
from apr.threads.thread import Thread

if TYPE_CHECKING:
    from apr import _core


class Step:
    """The threads of one call, on their way: `take_back` leaves the former as they were, until it
    is settled.

    Tokens are appended to a former thread where that is all that happens to it; any other change is
    made on a fork of it.
    """

    def __init__(self, threads: list[Thread], stored: Tensor) -> None:
        self.threads, self.stored = list(threads), stored
        self.owners = list(range(len(threads)))  # batch row -> index in threads
        self.ident = threading.get_ident()  # a forward of another Python thread is not ours to end
        # Tokens of this call that a thread has, by their flat index batch * width + column.
        self.queued: dict[Thread, list[int]] = {}
        self.core: _core.Step | None = None
        self.forward: BatchForward | None = None
        self.lent: Any = None  # to the model, where it keeps layer states
        self.now = stored  # which tokens of the call are real
        self.extras = False  # the call brings more than token ids
        self._former = {thread: len(thread) for thread in threads}
        self.settled = False  # the cache has its rows; nothing is to be undone any more
        self._made: list[Thread] = []

    def replace(self, threads: list[Thread]) -> None:
        """Go on with others, which were made for this step."""
        self.threads = threads
        self.owners = list(range(len(threads)))
        self._made += threads

    def forget(self) -> None:
        """Begin anew, with nothing stored."""
        self.replace([])
        self.stored = self.stored[:0, :0]

    def trim(self, lengths: list[int]) -> None:
        """Let every thread keep so many tokens."""
        for i, (thread, length) in enumerate(zip(self.threads, lengths, strict=True)):
            if length < len(thread):
                self._own(i).trim(length)

    def _own(self, index: int) -> Thread:
        """The thread of that number, as one that may be changed freely."""
        if self.threads[index] in self._former:
            self.threads[index] = self.threads[index].fork(1)[0]
            self._made.append(self.threads[index])
        return self.threads[index]

    def make_threads(self, session: Session, call: Call, keys: list[Any]) -> None:
        """One thread for each distinct row of a first call."""
        first: dict[Any, int] = {}
        self.owners = [first.setdefault(key, len(first)) for key in keys]
        self.threads = []
        for i in range(len(first)):
            thread = session.thread(request=i)
            self._made.append(thread)
            self.threads.append(thread)
        self.stored = torch.zeros(len(keys), call.past.shape[1], dtype=torch.bool, device="cpu")

    def queue(self, session: Session, call: Call) -> None:
        """Queue each thread's tokens, at their positions."""
        for i in range(len(self.threads)):
            row = self.owners.index(i)
            columns = call.real[row].nonzero()[:, 0].tolist()
            positions = call.real_positions(row)
            begin = 0
            while begin < len(columns):
                if positions[begin] != self.threads[i].position:
                    self._check_jump(session, call, i, columns[: begin + 1], positions[begin])
                    self._jump(session, i, positions[begin])
                end = begin + 1
                while end < len(columns) and positions[end] == positions[end - 1] + 1:
                    end += 1
                thread, part = self.threads[i], columns[begin:end]
                thread.extend(call.ids[row][part])
                self.queued[thread] = [row * call.width + column for column in part]
                begin = end

    def _check_jump(
        self, session: Session, call: Call, index: int, columns: list[int], position: int
    ) -> None:
        """A window counts positions here and places in stock: refuse a jump that makes them
        differ.
        """
        thread, row = self.threads[index], self.owners.index(index)
        if not len(thread) or not any(x.window or x.chunk for x in session.spec.layers):
            return
        places = self.stored.shape[1] + columns[-1]
        before = columns[:-1] or self.stored[row].nonzero()[-1:, 0].tolist()
        last = before[-1] + (self.stored.shape[1] if columns[:-1] else 0)
        if position - thread.position != places - last - 1:
            raise InvalidInput(
                f"apr.Cache: the positions of row {row} jump from {thread.position - 1} to "
                f"{position}, and its places do not; this model's windows count places: give "
                "positions that go on by one"
            )

    def _jump(self, session: Session, index: int, position: int) -> None:
        """Let a thread go on at `position`: a fork of it, which writes a segment that begins
        there.
        """
        child = self.threads[index].fork(1)[0]
        self._made.append(child)
        self.threads[index] = child
        region, tail = session.region(base=position), child.tail
        inherited = [entry for entry in child.view if entry.segment is not tail]
        child.view = [*inherited, (tail, None), (region, position)]
        child.writes = region

    def rows(self, plan: ops.Plan) -> Tensor:
        """[plan rows] flat index of each row of the plan."""
        ahead = {thread._id: iter(indices) for thread, indices in self.queued.items()}
        found = [next(ahead[writer], -1) for writer in plan.core.writers.tolist()]
        if min(found) < 0 or len(found) != sum(map(len, self.queued.values())):
            raise Error("apr.Cache: the step is not the batch; please report this")
        return torch.tensor(found, dtype=torch.long, device="cpu")

    def copies(self) -> list[tuple[int, int]]:
        """(row, the row that it equals) for rows that share a thread with an earlier one."""
        lead = [self.owners.index(owner) for owner in self.owners]
        return [(row, first) for row, first in enumerate(lead) if row != first]

    def rows_of(self) -> list[Thread]:
        """The thread of each row, when the forward has run."""
        if len(self.owners) == len(self.threads):
            return list(self.threads)
        counts = [self.owners.count(i) for i in range(len(self.threads))]
        kids: list[list[Thread]] = []
        for thread, count in zip(self.threads, counts, strict=True):
            kids.append(thread.fork(count) if count > 1 else [thread])
            self._made += kids[-1]
        return [kids[owner].pop(0) for owner in self.owners]

    def let_go(self, rows: list[Thread]) -> None:
        """Release what is no row any more."""
        for thread in {*self._former, *self._made} - set(rows):
            if thread.alive:
                thread.release()

    def take_back(self, session: Session) -> None:
        """Leave everything as it was; safe to call at any time, and twice."""
        if self.settled:
            return
        if self.forward is not None:
            self.forward.stop()
        session.end_step(self.core, self, commit=False)
        for thread in self._made:
            if thread.alive:
                thread.release()
        for thread, length in self._former.items():
            if thread.alive and len(thread) > length:
                thread.trim(length)


class BatchForward(PackedForward):
    """Attention of a [batch, tokens] forward whose real tokens are the plan's rows."""

    def __init__(self, session: Session, plan: ops.Plan | None, step: Step, call: Call) -> None:
        super().__init__(session.attachment, session.pools, plan)
        self._rows = None if plan is None else Copies(step.rows(plan))
        self._copies = step.copies()
        self._real = Copies(call.real)
        self._device = session.spec.device
        self._offset = step.stored.shape[1]
        self._running = Running(self, session.attachment.switch)

    def start(self) -> None:
        """Attend for this context's calls of the model, until `stop`."""
        self._running.__enter__()

    def stop(self) -> None:
        """Safe to call twice, and after a start that was interrupted."""
        self._running.__exit__(None, None, None)

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing dense is built; raises InvalidInput where the call's own mask is not the measured
        one.
        """
        self._check_causal(kwargs["mask_function"], int(kwargs["q_length"]))
        return super().mask(*args, **kwargs)

    def _check_causal(self, function: Any, width: int) -> None:
        """A token that sees the one behind it, as in an image, would be answered wrongly."""
        if width < 2:
            return
        device, real = self._device, self._real.on(self._device)
        rows = torch.arange(len(real), device=device)[:, None]
        here = torch.arange(width - 1, device=device)[None] + self._offset
        zero = torch.zeros((), dtype=torch.long, device=device)
        ahead = torch.as_tensor(function(rows, zero, here, here + 1), device=device)
        ahead = ahead.expand(len(real), width - 1) & real[:, :-1] & real[:, 1:]
        if bool(ahead.any()):
            raise InvalidInput(
                "apr.Cache: this call's arguments let tokens see what stands behind them (an image "
                "block or a prefix that sees itself both ways); such masks are not supported: use "
                "the model's own cache for this prompt"
            )

    def attend_lines(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, options: Any
    ) -> Tensor:
        batch, heads, tokens, _ = q.shape
        full = q.new_zeros(batch * tokens, heads, v.shape[3])
        if self._rows is None:  # a call of padding alone
            self.layer(module)
            return full.view(batch, tokens, heads, -1)
        self._check_copies(q, k, v)
        rows = self._rows.on(q.device)
        packed = [x.transpose(1, 2).flatten(0, 1)[rows] for x in (q, k, v)]
        full[rows] = self.attend_rows(module, packed[0], packed[1], packed[2], scale, options)
        out = full.view(batch, tokens, heads, -1)
        for copy, original in self._copies:
            out[copy] = out[original]
        if not torch.is_grad_enabled():
            return out
        passed: Tensor = _Inference.apply(out, q, k, v)  # type: ignore[no-untyped-call]
        return passed

    def _check_copies(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Rows that were given the same must be the same here: an adapter or a hook may tell them
        apart.
        """
        if not self._copies:
            return
        rows, originals = (list(side) for side in zip(*self._copies, strict=True))
        for x in (q, k, v):
            one, other = x[rows].transpose(1, 2), x[originals].transpose(1, 2)
            real = self._real.on(x.device)[originals]
            one, other = one[real].float(), other[real].float()
            # Equal rows of one product differ by its rounding: some last bits, of sums of
            # `head_dim` size.
            size = other.abs() + other.square().mean().sqrt()
            bits = 8 if x.dtype.itemsize == 2 else 512
            if bool(((one - other).abs() > bits * torch.finfo(x.dtype).eps * size).any()):
                raise InvalidInput(
                    "apr.Cache: rows with equal tokens come out different inside of the model (an "
                    "adapter for each row, a hook on one of them); make it with apr.Cache(model, "
                    "share_rows=False)"
                )


class _Inference(torch.autograd.Function):
    """Passes the attention's result on, and refuses to be differentiated: cached keys have no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise InvalidInput(
            "apr.Cache: there is no gradient through stored keys and values; call the model "
            "without this cache where you train, or under torch.no_grad()"
        )
