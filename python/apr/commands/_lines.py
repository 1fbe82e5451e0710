"""Prompts in a file, and their answers in another: each once, whatever happens in between."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from apr.errors import InvalidInput

_BEGINNING = b'{"index": '  # of each answer


@dataclass(frozen=True)
class Line:
    """A prompt: a text, or chat messages; `index` is the number of its line, from 0 on."""

    index: int
    id: Any
    prompt: Any


def read_prompts(path: Path) -> tuple[list[Line], list[str]]:
    """The prompts of a file of JSON lines, and what is wrong with the other lines."""
    try:
        rows = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--in: {path} cannot be read: {error}") from error
    lines, bad = [], []
    for index, row in enumerate(rows):
        if not row.strip():
            continue
        try:
            found = json.loads(row)
            json.dumps(found, ensure_ascii=False).encode()
        except ValueError as error:  # of half a character too
            bad.append(f"line {index + 1}: no JSON: {error}")
            continue
        told = found if isinstance(found, dict) else {"prompt": found}
        prompt = told.get("messages") or told.get("prompt")
        is_chat = isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)
        if prompt and (isinstance(prompt, str) or is_chat):
            lines.append(Line(index, told.get("id", index), prompt))
        else:
            bad.append(f'line {index + 1}: expected {{"prompt": "..."}} or {{"messages": [...]}}')
    return lines, bad


class Answers:
    """The file of answers, which one process at a time may write: what it holds is not asked again.

    settings: what the answers depend on besides their prompts. Raises InvalidInput where the file
    is another process's, or holds answers to other prompts, or by other settings.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self._settings = path, settings
        self.done: dict[int, str] = {}
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise InvalidInput(f"--out: {path} cannot be written: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise InvalidInput(f"--out: another process writes {path}; wait for it") from error
        self._read()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def _read(self) -> None:
        """Note what is there; a last line that was being written when its process ended goes."""
        self._file.seek(0)
        whole = 0
        for row in self._file:
            if not row.endswith(b"\n") and row.startswith(_BEGINNING[: len(row)]):
                break
            try:
                told = json.loads(row)
                self.done[told["index"]] = told["key"]
            except (ValueError, KeyError, TypeError) as error:
                self._file.close()
                raise InvalidInput(
                    f"--out: {self.path} holds lines that are no answers; give another file"
                ) from error
            whole += len(row)
        self._file.truncate(whole)

    def key(self, line: Line) -> str:
        """What an answer was made of."""
        text = json.dumps([line.prompt, self._settings], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def missing(self, lines: Sequence[Line]) -> list[Line]:
        """The prompts without an answer."""
        for line in lines:
            if self.done.get(line.index, self.key(line)) != self.key(line):
                raise InvalidInput(
                    f"--out: {self.path} has an answer for line {line.index + 1} that was made of "
                    "another prompt, or with other options; give another file"
                )
        return [line for line in lines if line.index not in self.done]

    def write(self, answers: Iterable[tuple[Line, dict[str, Any]]]) -> int:
        """Append answers, as a whole, to those that are there; how many were new."""
        rows = []
        for line, told in answers:
            if line.index not in self.done:
                self.done[line.index] = self.key(line)
                row = {"index": line.index, "id": line.id, **told, "key": self.key(line)}
                rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.write("".join(rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(rows)
