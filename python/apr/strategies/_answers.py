"""Ways to read an answer out of a text, for votes."""

from __future__ import annotations

import re
from collections.abc import Callable

from apr.errors import InvalidInput


def last_number(text: str) -> str | None:
    """The last number of a text, thousands separators and trailing zeros of a fraction left out."""
    found: list[str] = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text, braces counted."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return None


def matching(pattern: str) -> Callable[[str], str | None]:
    """An extractor: the last match of a regular expression, its first group where it has one."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InvalidInput(
            f"pattern: got {pattern!r}, no regular expression ({error}); expected one, e.g. 'x = (.*)'"
        ) from error

    def extract(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return None if not found else found[-1].group(1 if compiled.groups else 0)

    return extract
