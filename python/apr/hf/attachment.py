"""Attaches a model: measured and proved once, then run by packed forwards on the registered
attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apr import ops
from apr.errors import Error, InvalidInput, UnsupportedModel
from apr.hf.graph_states import GraphStates
from apr.hf.interface import OF_THE_MACHINE, Running
from apr.hf.model_state import Watch, known, structure, undisturbed, unwrap
from apr.hf.packed import PackedForward, changed, out_of_table
from apr.hf.probe import measure, measure_rows, refuse
from apr.hf.ranks import RankGroup
from apr.hf.row_forward import KeepsAll
from apr.hf.self_test import self_test
from apr.hf.spec import ModelSpec
from apr.hf.vectors import RowVectors
from apr.ops import device as gpu


class Attachment:
    """A model whose forwards can run on the registered attention; between them it is the user's as
    it was.

    Several sessions may hold one model, in several Python threads.
    """

    def __init__(self, model: Any) -> None:
        self.model = unwrap(model)
        # One that torch.compile wrapped runs compiled.
        self.call = model if getattr(model, "_orig_mod", None) is self.model else self.model
        if self.model.training:
            raise InvalidInput("model: got a model in training mode; call model.eval() first")
        if self.model.device.type != "meta":  # where offloaded weights rest
            gpu.backend(self.model.device)  # refused where there are no kernels
        with undisturbed(self.model.device):
            self._known = known(self.model, measure)
        for device in self.spec.devices:
            gpu.backend(device)
        self.owner, self.switch = self._known.owner, self._known.switch
        self.switch.keep_latents([linear for linear in self.linears() if linear is not None])
        weights = (weight() for weight in self._known.weights)
        self._watch = Watch(self.model, [w for w in weights if w is not None])

    @property
    def spec(self) -> ModelSpec:
        """What was measured of the model."""
        return self._known.spec

    def linears(self) -> list[nn.Linear | None]:
        """`ModelSpec.linears` of the model; raises UnsupportedModel where it is another one."""
        try:
            return self.spec.linears(self.model)
        except AttributeError as error:
            raise changed(self.model, f"others (of {error})") from error

    @property
    def rank_group(self) -> RankGroup | None:
        """The ranks that hold the model in parts; None where one process has it all."""
        return self._known.ranks

    @property
    def tested(self) -> bool:
        """Whether this model, as it is, has passed the self-test."""
        return self._known.tested

    @tested.setter
    def tested(self, value: bool) -> None:
        self._known.tested = value

    def check_unchanged(self, remedy: str) -> None:
        """Raise InvalidInput where the model is in training mode, or not the one that was
        measured.
        """
        self._watch.check(remedy)
        if self._watch.configured_anew():
            with undisturbed(self.model.device):
                now = known(self.model, measure).spec
                if now != self.spec and self.spec.by_rows:
                    # That rows are kept was found by a proof, and not by measuring.
                    now = measure_rows(self.model, self.switch, UnsupportedModel(self.spec.why))
            if now != self.spec:
                raise InvalidInput(
                    "the model's configuration was changed, and with it what its attention sees "
                    f"or how it turns; {remedy}"
                )
            self._watch.accept()

    @property
    def is_current(self) -> bool:
        """Whether the model is the one that was measured, with the weights of then."""
        try:
            self._watch.check("")
        except InvalidInput:
            return False
        return self._known.structure == structure(self.model)

    @contextmanager
    def kept_by_rows(self, why: UnsupportedModel) -> Iterator[None]:
        """Take the model as one whose cache is kept by rows, as its steps are wrong otherwise, for
        good unless the block raises. Raises `why` where that is not possible.
        """
        measured = self.spec
        if measured.by_rows:
            raise why
        self._known.spec = measure_rows(self.model, self.switch, why)
        try:
            yield
        except BaseException:
            self._known.spec = measured
            raise

    def running(self, packed: PackedForward) -> Running | nullcontext[None]:
        """The context in which the model's attention is that of `packed`, where it attends by the
        plan, or is looked at.
        """
        states = self.spec.states
        if states is None or not self.spec.by_rows:
            return Running(packed, self.switch)
        return Running(KeepsAll(self.owner), self.switch) if states.chooses else nullcontext()

    def forward(
        self,
        plan: ops.Plan,
        rows: Sequence[int],
        pools: Sequence[ops.Pool],
        vectors: RowVectors | None = None,
    ) -> Tensor:
        """One packed forward; logits [len(rows), vocab] of the plan's `rows`, unchecked."""
        device = self.spec.device
        packed = PackedForward(self, pools, plan, vectors)
        ids = gpu.uploaded(plan.core.ids, device)[None]
        positions = gpu.uploaded(plan.core.positions, device)[None]
        keep = self.spec.rows_to_keep(rows)
        if self.spec.keeps_rows:
            return self._run(packed, ids, positions, {"logits_to_keep": keep})
        return self._run(packed, ids, positions, {})[keep]

    def forward_static(
        self,
        plan: ops.Plan,
        pools: Sequence[ops.Pool],
        ids: Tensor,
        positions: Tensor,
        states: GraphStates | None,
    ) -> Tensor:
        """One forward over tensors at fixed addresses, ids and positions [1, rows]: logits [rows,
        vocab].
        """
        packed = PackedForward(self, pools, plan)
        if states is not None:
            return states.forward(self, packed, ids.view(-1, 1), positions.view(-1, 1))
        return self._run(packed, ids, positions, {})

    def _run(
        self, packed: PackedForward, ids: Tensor, positions: Tensor, extra: dict[str, Any]
    ) -> Tensor:
        try:
            with Running(packed, self.switch), torch.no_grad():
                out = self.call(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        except IndexError as error:
            raise out_of_table(int(positions.max()), error) from error
        packed.check_complete(self.model)
        logits: Tensor = out.logits[0].to(self.spec.device)
        return logits


def _prove(attachment: Attachment, model: Any) -> None:
    """Pass the self-test with what was measured, or else by rows of the model's own cache."""
    try:
        return self_test(attachment, model)
    except UnsupportedModel as error:
        why = error
    except (Error, *OF_THE_MACHINE):
        raise
    except Exception as error:  # from the model's own code, which did not expect such a forward
        why = refuse(attachment.model, f"its steps failed ({type(error).__name__}: {error})")
    with attachment.kept_by_rows(why):
        try:
            self_test(attachment, model)
        except OF_THE_MACHINE:
            raise
        except Exception as error:
            raise why from error


def attach(model: Any, prove: bool = True) -> Attachment:
    """Attach a model; with `prove` it passes the self-test first, once for a model as it is.

    Raises UnsupportedModel with the reason where it cannot be attached.
    """
    attachment = Attachment(model)
    if prove and not attachment.tested:
        with undisturbed(attachment.spec.device):
            _prove(attachment, model)
        attachment.tested = True
        if attachment.spec.by_rows:
            warnings.warn(
                f"{type(attachment.model).__name__} runs by rows of its own cache, which is right "
                f"and slower: {attachment.spec.why}",
                stacklevel=4,
            )
    return attachment
