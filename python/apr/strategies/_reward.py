"""Scores of texts by a reward model: any transformers sequence classifier, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from apr.errors import InvalidInput


def number(who: str, value: Any) -> float:
    """What a verifier, weight or reward function gave, as a number; None abstains, as NaN does."""
    if value is None:
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"{who}: got {value!r:.60}; expected a number, or None to abstain"
        ) from error


class RewardModel:
    """Scores (prompt, text) pairs with a sequence classifier of its own tokenizer.

    One label: its logit is the score. More: the log-probability of the last. render(prompt, text)
    makes what the classifier reads; by default one after the other. The prompt is the text that the
    model saw: of chat messages with the roles and tags of its chat template; a classifier with a
    template of its own wants a `render`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 16,
        render: Callable[[str, str], str] | None = None,
    ) -> None:
        if not hasattr(getattr(model, "config", None), "num_labels"):
            raise InvalidInput(
                f"reward model: got {type(model).__name__}; expected a transformers sequence "
                "classifier, e.g. AutoModelForSequenceClassification.from_pretrained(...)"
            )
        if tokenizer.pad_token_id is None and batch_size > 1:
            raise InvalidInput(
                "reward model: the tokenizer has no pad token, so texts cannot be batched; set "
                "tokenizer.pad_token (and model.config.pad_token_id), or batch_size=1"
            )
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.render = render or (lambda prompt, text: prompt + text)

    @torch.no_grad()
    def __call__(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """One score a text, higher is better."""
        scores: list[float] = []
        for first in range(0, len(texts), self.batch_size):
            rendered = [self.render(prompt, t) for t in texts[first : first + self.batch_size]]
            padding = len(rendered) > 1
            batch = self.tokenizer(rendered, return_tensors="pt", padding=padding)
            logits = self.model(**batch.to(self.model.device)).logits.float()
            one = logits[:, 0] if logits.shape[1] == 1 else logits.log_softmax(-1)[:, -1]
            scores += one.tolist()
        return scores
