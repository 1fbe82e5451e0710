"""The same on a Ray cluster: a session a worker; what a lost worker had is run again by Ray."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple
from typing import Any

from apr.commands._lines import Line
from apr.errors import InvalidInput


class _Worker:
    """Answers chunks in a process of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        from apr.commands._models import opened

        self._options = argparse.Namespace(**options)
        self._open = ExitStack()
        self._session, self._tokenizer = self._open.enter_context(opened(self._options))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        from apr.commands.batch import answer_chunk

        told = []
        for text in batch["chunk"]:
            chunk = [Line(*fields) for fields in json.loads(str(text))]
            answers = answer_chunk(self._options, self._session, self._tokenizer, chunk)
            told.append(json.dumps([(astuple(line), answer) for line, answer in answers]))
        return {"told": told}


def answered_by_ray(
    options: argparse.Namespace, chunks: list[list[Line]]
) -> Iterator[list[tuple[Line, dict[str, Any]]]]:
    """Each chunk's answers, as they come: the caller alone writes, so that nothing is written
    twice.
    """
    if not chunks:
        return
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InvalidInput("--ray needs the ray package: pip install 'apr[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    plain = {name: value for name, value in vars(options).items() if name not in ("prompts", "out")}
    rows = [{"chunk": json.dumps([astuple(line) for line in chunk])} for chunk in chunks]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Worker,
        fn_constructor_args=(plain,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.ray),
        num_gpus=1 if ray.cluster_resources().get("GPU") and not options.engine else 0,
        max_restarts=-1,
        max_task_retries=-1,
    )
    for row in answers.iter_rows():
        yield [(Line(*fields), answer) for fields, answer in json.loads(row["told"])]
