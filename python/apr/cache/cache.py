"""`apr.Cache`: the drop-in for `model.generate(past_key_values=...)`."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from apr.cache.call import Call, common_columns, follow, hide, read_call
from apr.cache.forward import BatchForward, Step
from apr.cache.hooks import After, Before
from apr.cache.states import BatchStates, layers_of
from apr.errors import InvalidInput, OutOfPages, UnsupportedModel
from apr.hf.compatibility import asked_by_whole_prefill, describe, in_prefill
from apr.hf.packed import changed, plan_of
from apr.hf.probe import counts_padding
from apr.threads.session import Session
from apr.threads.thread import Thread


class Cache(transformers.Cache):  # type: ignore[misc]
    """A cache for `generate()` and for loops that call `model(..., past_key_values=cache)`.

    Rows of the first call that are equal in every argument (`num_return_sequences`, beams) become
    forks of one thread: their prompt is stored once; `share_rows=False` leaves them apart. Padding
    is not stored. `threads` are the rows, to fork or join after. A `generate()` is given its whole
    prompt: what it has in common with the stored text is kept, the rest is trimmed.
    `copy.deepcopy(cache)` forks its threads in the same session. Other arguments are those of
    `apr.Session`; `checkpoint_tokens` keeps no state inside of one call's text. Close it, or let it
    go, to free its pages.
    """

    is_compileable = False

    def __init__(
        self,
        model: Any,
        max_tokens: int | None = None,
        *,
        share_rows: bool = True,
        **session_options: Any,
    ) -> None:
        session = Session(model, max_tokens, **session_options)
        self._open(session, weakref.WeakSet(), share_rows)

    def _open(self, session: Session, sharers: weakref.WeakSet[Cache], share_rows: bool) -> None:
        self._states = None if session.spec.states is None else BatchStates(session)
        super().__init__(layers=layers_of(self, session))
        self.session, self.share_rows = session, share_rows
        self.threads: list[Thread] = []
        # [batch, length]: which places are no padding.
        self._stored = torch.zeros(0, 0, dtype=torch.bool, device="cpu")
        self._step: Step | None = None
        self._begun = False  # a generate() has begun, and fed nothing yet
        self._answered = False  # its prefill was told to leave nothing out
        self._embedded = False  # some stored tokens came as embeddings, images or the like
        # Layer states read lines, in which padding leaves no gap.
        self._counts_padding = None if self._states is None else False
        self._sharers = sharers  # caches on the same session; the last one to close closes it
        sharers.add(self)
        self._hook(session.attachment.model)

    def _hook(self, model: Any) -> None:
        self._hooks = [
            model.register_forward_pre_hook(Before(self, model), with_kwargs=True),
            model.register_forward_hook(After(self), with_kwargs=True, always_call=True),
        ]

    def close(self) -> None:
        """Free the pages; safe to call twice."""
        if self._step is not None:
            self._after()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._sharers.discard(self)
        if not self._sharers:
            self.session.close()
        else:
            self._release(self.threads)
        self.threads = []

    def __del__(self) -> None:
        if getattr(self, "_hooks", None):
            self.close()

    def _release(self, threads: Sequence[Thread]) -> None:
        for thread in threads:
            if thread.alive:
                thread.release()

    # ---- around a forward -----------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        session = self.session
        if self._step is not None:
            raise InvalidInput(
                "apr.Cache: another Python thread is inside of a forward with this cache; take "
                "turns, or give each Python thread a cache of its own on the same model"
            )
        if module is not session.attachment.model:
            raise InvalidInput(
                "apr.Cache: got a copy of the model that it was made for; make one with "
                "apr.Cache(copy)"
            )
        session.attachment.check_unchanged("call cache.reset() and feed the text again")
        for name in ("output_attentions", "output_hidden_states"):
            if arguments.get(name) is None and getattr(module.config, name, False):
                arguments[name] = True
        self._notice_edits()
        begun, whole = self._begun, self._answered and in_prefill()
        self._begun = self._answered = False
        call = read_call(dict(arguments), self._length, begun, whole)
        try:
            return self._begin(call)
        except OutOfPages:
            if not (call.whole and self.threads):
                raise
        # The whole prompt is here, so what is stored of another text may make room for it.
        self._forget()
        return self._begin(read_call(arguments, 0, begun, whole))

    def _begin(self, call: Call) -> dict[str, Any]:
        """Make the threads of a call's rows and start its forward; returns its arguments."""
        step = Step(self.threads, self._stored)
        try:
            self._arrange(call, step)
            self._run_from(call, step)
        except BaseException:
            step.take_back(self.session)
            self._step = None
            raise
        return call.arguments

    def _notice_edits(self) -> None:
        """Follow what the user did to the threads between two calls: trims, steps."""
        if not all(thread.alive for thread in self.threads):
            raise InvalidInput(
                "apr.Cache: a thread of it was released, by you or by a refresh of its session; "
                "call reset() and feed the text again"
            )
        if any(thread.queued for thread in self.threads):
            raise InvalidInput(
                "apr.Cache: its threads have tokens of yours queued; run them with "
                "cache.session.step(cache.threads), or trim them, before the next call"
            )
        self._stored = follow(self._stored, [len(thread) for thread in self.threads])

    def _arrange(self, call: Call, step: Step) -> None:
        """Make the threads those of the call's rows, with the past it sees; queues nothing."""
        batch = call.ids.shape[0]
        if call.whole and self.threads:
            self._rewind(call, step)
        if step.threads and batch != len(step.threads):
            times, rest = divmod(batch, len(step.threads))
            if rest:
                raise InvalidInput(
                    f"apr.Cache: got {batch} rows; expected {len(step.threads)}, as in the call "
                    "before, or a multiple (samples of each); call reset() to start anew"
                )
            step.replace([kid for thread in step.threads for kid in thread.fork(times)])
            step.stored = step.stored.repeat_interleave(times, 0)
        if step.threads and not (call.masked or self.session.spec.takes_positions):
            call.past = step.stored  # states alone: what they have read needs no mask
        if step.threads and not torch.equal(call.past, step.stored):
            step.trim(hide(step.threads, step.stored, call.past))
            step.stored = call.past
        call.positions = self._positions(call)
        self.session.spec.check_position(int(call.positions.max()))

    def _rewind(self, call: Call, step: Step) -> None:
        """Keep what the whole prompt has in common with what is stored."""
        rows, batch = len(step.threads), call.ids.shape[0]
        extras = bool(call.extras())
        if self._embedded and not extras:
            raise InvalidInput(
                "apr.Cache: it holds images or embeddings, and this prompt brings none to compare; "
                "feed the new tokens alone with the whole attention_mask, or call reset()"
            )
        if batch % rows or extras or not call.spare_columns:
            return step.forget()
        if batch != rows:
            step.replace([k for thread in step.threads for k in thread.fork(batch // rows)])
        call.positions = self._positions(call)
        columns, kept = common_columns(call, step.threads)
        if self._states is not None and (self._states.spec.one_token or not all(kept)):
            return step.forget()
        step.trim(kept)
        call.cut(columns)
        step.stored = call.past

    def _positions(self, call: Call) -> Tensor:
        """[batch, width] positions: those given, or those that the model would give."""
        if call.positions is not None:
            return call.positions
        if self._counts_padding is None and not (call.real.all() and call.past.all()):
            self._counts_padding = counts_padding(self.session.attachment.model)
        return call.own_positions(self._counts_padding is not False)

    def _run_from(self, call: Call, step: Step) -> None:
        """Queue the call's tokens and start the forward that runs them."""
        session = self.session
        if not step.threads:
            keys = call.keys() if self.share_rows else list(range(call.ids.shape[0]))
            step.make_threads(session, call, keys)
        if self._states is not None:
            self._states.check(call, step)
            session.restore_states(step.threads)
        step.queue(session, call)
        plan = None
        if step.queued:
            step.core = session.begin_step(list(step.queued), 1 << 40, step)
            session.next_forward(step.core)
            plan = plan_of(step.core, session.pools, session.invariant)
            if self._states is not None:
                self._states.lend(self, call, step)
        step.extras = bool(call.extras())
        step.now = call.real
        arguments, spec = call.arguments, session.spec
        if spec.takes_positions:
            arguments["position_ids"] = call.positions.to(spec.device)  # type: ignore[union-attr]
        arguments["use_cache"] = True
        if call.spare_columns and spec.keeps_rows:
            # As numbers: a model that is told "the last one" may leave rows out of its last layers.
            arguments["logits_to_keep"] = spec.rows_to_keep(call.kept_columns)
        step.forward = BatchForward(session, plan, step, call)
        self._step = step
        step.forward.start()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, output: Any = None) -> Any:
        """End this Python thread's forward, whose output is returned with this cache in it, or,
        without one, take it back; another's is not ours to end.

        torch calls no hook after a KeyboardInterrupt: then whoever uses the cache next takes back
        what is left.
        """
        if self._step is not None and self._step.ident == threading.get_ident():
            return self._after(output)
        return None

    def _after(self, output: Any = None) -> Any:
        step = self._step
        assert step is not None
        try:
            if output is None or step.forward is None:
                step.take_back(self.session)
                return None
            step.forward.stop()
            if not step.forward.is_complete:
                raise changed(self.session.model, "fewer")
            self.session.table.tokens_tell &= not step.extras
            if self._states is not None:
                output = self._states.keep(self, step, output)
            self.session.end_step(step.core, step, commit=True)
            rows, stored = step.rows_of(), torch.cat([step.stored, step.now], 1)
            self.threads, self._stored, step.settled = rows, stored, True
            self._embedded = step.extras or (self._embedded and bool(step.stored.numel()))
            step.let_go(rows)
            return output
        except BaseException:
            step.take_back(self.session)
            raise
        finally:
            self._step = None

    # ---- transformers' side ---------------------------------------------------------------------

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        """generate() marks a cache that it is given; when it asks then what of its prompt to leave
        out, the answer is nothing, so that the whole prompt comes and is compared with what is
        stored.
        """
        self._begun, self._answered = value, False

    @property
    def _length(self) -> int:
        return self._stored.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Nothing is stored here: the attention function stores what it is given."""
        if self._step is None:
            raise UnsupportedModel(
                "apr.Cache: no hook of it ran before this forward. Pass it to the model that it "
                "was made for, as past_key_values (or cache), and not to a part of it; this is "
                f"{describe()}"
            )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places, stored or padding; 0 for a generate() that asks what of its prompt to skip."""
        if self._step is not None:
            return self._step.stored.shape[1]
        if self._begun and asked_by_whole_prefill():
            self._answered = True
            return 0
        self._notice_edits()
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_initialized(self) -> bool:
        return bool(self.threads)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return len(self.threads) or -1

    max_batch_size = batch_size

    def reset(self) -> None:
        """Forget everything; the next call starts anew, with the model as it is then.

        Where the model was changed, all threads of the session are released, those of copies too.
        """
        self._finish()
        self._forget()
        if not self.session.attachment.is_current:
            self.session.refresh()

    def _forget(self) -> None:
        self._release(self.threads)
        self.threads, self._embedded = [], False
        self._begun = self._answered = False
        self._stored = torch.zeros(0, 0, dtype=torch.bool, device="cpu")

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` places of every row; nothing is copied."""
        if tokens_to_remove > 0:
            raise InvalidInput(
                f"crop: got {tokens_to_remove}; expected the number of tokens to remove as a "
                "negative number"
            )
        self._notice_edits()
        left = max(0, self._length + tokens_to_remove)
        kept = self._stored[:, :left].sum(1).tolist()
        for thread, count in zip(self.threads, kept, strict=True):
            thread.trim(count)
        self._stored = self._stored[:, :left]

    def _select(self, rows: list[int]) -> None:
        """Make the rows those of the given numbers; a row taken twice is forked."""
        uses = Counter(rows)
        kids = {i: self.threads[i].fork(n) for i, n in uses.items() if n > 1}
        chosen = [kids[i].pop(0) if i in kids else self.threads[i] for i in rows]
        self._release([t for i, t in enumerate(self.threads) if uses[i] != 1])
        self.threads, self._stored = chosen, self._stored[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by number (beam search)."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by number or by a mask."""
        self._select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._select([i for i in range(len(self.threads)) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """A cache of its own in the same session, whose threads are forks of these."""
        self._notice_edits()
        other = type(self).__new__(type(self))
        other._open(self.session, self._sharers, self.share_rows)
        other.threads = [thread.fork(1)[0] for thread in self.threads]
        other._stored, other._embedded = self._stored.clone(), self._embedded
        return other

    def __reduce__(self) -> Any:
        raise InvalidInput(
            "apr.Cache: a cache lies in its session's memory; copy.deepcopy(cache) forks it, and "
            "cache.threads[i].tokens are data"
        )

    def __copy__(self) -> Cache:
        return self.__deepcopy__({})
