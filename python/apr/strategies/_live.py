"""What methods share whose threads read each other while they write: the answer from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apr.decode import Decoded, decode
from apr.session import Session
from apr.strategies._requests import encode_plain
from apr.thread import ViewLike


def joint_answers(
    session: Session,
    tokenizer: Any,
    views: Sequence[ViewLike],
    prompt: Any,
    tokens: int,
    options: dict[str, Any],
) -> Sequence[Decoded | None]:
    """What readers of these views write after `prompt`, greedily; None each without one.

    All readers write side by side. Of `options` the end tokens are kept.
    """
    if prompt is None:
        return [None] * len(views)
    ids = encode_plain(tokenizer, prompt)
    kept = {k: v for k, v in options.items() if k in ("eos_token_id", "pad_token_id")}
    readers = []
    try:
        for view in views:
            readers.append(session.thread(ids, view=view))
        return decode(
            session,
            readers,
            tokenizer=tokenizer,
            max_new_tokens=tokens,
            do_sample=False,
            **kept,
        )
    finally:
        for reader in readers:
            if reader.alive:
                reader.release()
