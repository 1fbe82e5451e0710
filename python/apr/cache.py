"""`apr.Cache`: the drop-in for `model.generate(past_key_values=...)`; equal rows share one stored prefix."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from apr import ops
from apr.errors import Error, InvalidInput, UnsupportedModel
from apr.hf import PackedForward
from apr.interface import start_running, stop_running
from apr.session import Session
from apr.thread import Thread


class _BatchForward(PackedForward):
    """Attention of a [batch, tokens] forward whose real tokens are the plan's rows.

    rows: [plan rows] flat index batch * tokens + token of each plan row; copies: batch rows whose output is
    another row's, because their tokens are the same.
    """

    def __init__(
        self, session: Session, plan: ops.Plan, rows: Tensor, copies: list[tuple[int, int]]
    ) -> None:
        super().__init__(session.spec, session.pools, plan, session.attachment.owner)
        self._rows, self._copies = rows, copies

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor:
        batch, heads, tokens, _ = q.shape
        packed = [x.transpose(1, 2).flatten(0, 1)[self._rows] for x in (q, k, v)]
        out = self.attend_rows(module, packed[0], packed[1], packed[2], scale, options)
        full = out.new_zeros(batch * tokens, heads, out.shape[2])
        full[self._rows] = out
        full = full.view(batch, tokens, heads, -1)
        for copy, original in self._copies:
            full[copy] = full[original]
        return full


class _Step:
    """What one forward has to undo or confirm."""

    def __init__(self, core: Any, threads: list[Thread], queued: dict[Thread, int], width: int):
        self.core, self.threads, self.queued, self.width = core, threads, queued, width
        self.owners: list[int] = []  # batch row -> index in threads
        self.appended: dict[Thread, int] = {}  # tokens of this call, to trim where it fails
        self.forward: _BatchForward | None = None
        self.ident = threading.get_ident()  # a forward of another Python thread is not ours to end


class Cache(transformers.Cache):  # type: ignore[misc]
    """A cache for `generate()` and for loops that call `model(..., past_key_values=cache)`.

    Rows of the first call whose tokens are equal (`num_return_sequences`) become forks of one thread: their
    prompt is stored once. Left padding is not stored at all. `threads` are the rows, to fork or join
    after. Beams, assisted generation and cropping are refused. Close it, or let it go, to free its pages.
    """

    is_compileable = False

    def __init__(self, model: Any, max_tokens: int | None = None, **session_options: Any) -> None:
        super().__init__(layers=[])
        self.session = Session(model, max_tokens, **session_options)
        self.threads: list[Thread] = []
        self._length = 0
        self._step: _Step | None = None
        me = weakref.ref(self)  # the model must not keep the cache alive

        def before(module: Any, args: Any, kwargs: Any) -> Any:
            cache = me()
            if cache is None:
                return None
            cache._abandon()
            mine = kwargs.get("past_key_values") is cache
            return cache._before(args, kwargs) if mine else None

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            cache = me()
            if cache is not None and cache._step is not None:
                cache._after(output is not None)

        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]

    def _abandon(self) -> None:
        """Take back a forward that was interrupted: torch calls no hook after a KeyboardInterrupt."""
        if self._step is not None and self._step.ident == threading.get_ident():
            self._after(False)

    def close(self) -> None:
        """Free the pages and give the model back; safe to call twice."""
        self._abandon()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.threads = []
        self.session.close()

    def __del__(self) -> None:
        if getattr(self, "_hooks", None):
            self.close()

    # ---- around a forward -----------------------------------------------------------------------

    def _before(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InvalidInput("apr.Cache: got inputs_embeds; expected input_ids")
        batch, width = ids.shape
        if self.threads and batch != len(self.threads):
            raise InvalidInput(
                f"apr.Cache: got {batch} rows; expected {len(self.threads)}, as in the call before; "
                "call reset() to start anew"
            )
        if any(thread.queued for thread in self.threads):
            raise InvalidInput(
                "apr.Cache: its threads have tokens of yours queued; run them with "
                "cache.session.step(cache.threads), or trim them, before the next call"
            )
        valid = self._valid(ids, kwargs.get("attention_mask"))
        step = self._queue(ids, valid)
        try:
            if not step.core.next() or step.core.plan.num_rows != sum(step.queued.values()):
                raise Error("apr.Cache: the step is not the batch; please report this")
            plan = ops.Plan(step.core.plan, invariant=self.session.invariant)
            rows, copies = self._layout(step, valid, width)
            kwargs["position_ids"] = self._positions(
                plan, rows, copies, valid, kwargs.get("position_ids")
            )
            for pool in self.session.pools if step.core.plan.num_copies else ():
                ops.copy_tokens(pool, plan)
            kwargs["use_cache"] = True
            step.forward = _BatchForward(self.session, plan, rows, copies)
            start_running(step.forward)
        except BaseException:
            self._undo(step)
            raise
        self._step = step
        return args, kwargs

    def _valid(self, ids: Tensor, mask: Any) -> Tensor:
        """[batch, width] real tokens of this call."""
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
            raise InvalidInput(
                "apr.Cache: got an attention_mask that is not [batch, tokens]; expected the 2-D padding "
                "mask of the tokenizer"
            )
        now = mask[:, -ids.shape[1] :].bool()
        if bool((now[:, :-1] & ~now[:, 1:]).any()) or not bool(now[:, -1].all()):
            raise InvalidInput(
                "apr.Cache: got padding on the right or inside; expected left padding: "
                'set tokenizer.padding_side = "left"'
            )
        return now

    def _queue(self, ids: Tensor, valid: Tensor) -> _Step:
        """Queue every row's tokens on its thread; equal rows of a first call share one."""
        session, texts = self.session, []
        for row, real in zip(ids.tolist(), valid.tolist(), strict=True):
            texts.append(tuple(t for t, r in zip(row, real, strict=True) if r))
        owners, threads = list(range(len(texts))), list(self.threads)
        made: list[Thread] = []
        try:
            if not threads:
                first: dict[tuple[int, ...], int] = {}
                owners = [first.setdefault(text, len(first)) for text in texts]
                for i, text in enumerate(first):
                    made.append(session.thread(text, request=i))
                threads = made
            else:
                for thread, text in zip(threads, texts, strict=True):
                    thread.extend(text)
            core = session._begin(threads, step_tokens=1 << 40)
        except BaseException:
            for thread, text in zip(self.threads, texts, strict=False):
                thread.trim(len(thread) - min(thread.queued, len(text)))
            raise
        step = _Step(core, threads, {t: t.queued for t in threads}, ids.shape[1])
        step.owners = owners
        if self.threads:
            step.appended = dict(zip(threads, map(len, texts), strict=True))
        return step

    def _layout(
        self, step: _Step, valid: Tensor, width: int
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        lead: dict[int, int] = {}
        copies = []
        for row, owner in enumerate(step.owners):
            if owner in lead:
                copies.append((row, lead[owner]))
            lead.setdefault(owner, row)
        rows = [
            torch.arange(width, device=valid.device)[valid[lead[i]]] + lead[i] * width
            for i in range(len(step.threads))
        ]
        return torch.cat(rows), copies

    def _positions(
        self,
        plan: ops.Plan,
        rows: Tensor,
        copies: list[tuple[int, int]],
        valid: Tensor,
        given: Tensor | None,
    ) -> Tensor:
        """Position ids [batch, width] as the threads write; what the caller passed must agree."""
        ours = torch.zeros(valid.numel(), dtype=torch.long, device=valid.device)
        ours[rows] = torch.from_numpy(plan.core.positions).to(valid.device)
        ours = ours.view(valid.shape)
        for copy, original in copies:
            ours[copy] = ours[original]
        if given is not None and bool((given.expand_as(ours) != ours)[valid].any()):
            raise InvalidInput(
                "apr.Cache: got position_ids that do not count each row's real tokens from 0; leave "
                "position_ids out, or use an apr.Session for views of your own"
            )
        return ours

    def _after(self, finished: bool) -> None:
        step, self._step = self._step, None
        assert step is not None
        if step.forward is not None:
            stop_running(step.forward)
        if not finished:
            self._undo(step)
            return
        self.session._end(step.core, commit=True)
        self._length += step.width
        if not self.threads:
            kids: list[list[Thread]] = []
            for i, thread in enumerate(step.threads):
                count = step.owners.count(i)
                kids.append(thread.fork(count) if count > 1 else [thread])
            self.threads = [kids[owner].pop(0) for owner in step.owners]

    def _undo(self, step: _Step) -> None:
        self.session._end(step.core, commit=False)
        for thread, appended in step.appended.items():
            thread.trim(len(thread) - appended)

    # ---- transformers' side ---------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Nothing is stored here: the attention function stores what it is given."""
        if self._step is None:
            raise UnsupportedModel(
                "apr.Cache was passed to a model other than the one it was made for; make one with "
                "apr.Cache(model)"
            )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.session.spec.layers)

    def reset(self) -> None:
        """Forget everything; the next call starts anew."""
        self._abandon()
        for thread in self.threads:
            thread.release()
        self.threads, self._length = [], 0


def _refused(name: str, use: str) -> Callable[..., Any]:
    def method(self: Cache, *args: Any, **kwargs: Any) -> Any:
        raise InvalidInput(
            f"apr.Cache.{name}: {use} is not supported yet; sample with do_sample=True"
        )

    method.__name__ = name
    return method


for _name, _use in {
    "reorder_cache": "beam search",
    "crop": "assisted generation",
    "batch_repeat_interleave": "beam search",
    "batch_select_indices": "contrastive search",
}.items():
    setattr(Cache, _name, _refused(_name, _use))
