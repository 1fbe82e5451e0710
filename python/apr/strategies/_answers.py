"""Ways to read an answer out of a text, for votes."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from apr.errors import InvalidInput

# Between digits: a comma, or a blank that sets thousands apart (thin, narrow, no-break).
_THOUSANDS = r"\d{1,3}(?:(?:,|\{,\}|\\,|[\u2009\u202f\u00a0])\d{3})+(?!\d)"
_DIGITS = rf"(?:{_THOUSANDS}|\d+)(?:\.\d+)?|(?<![\d.])\.\d+"
# A minus belongs to the number unless something stands right before it, as in 10-20 or x-1.
_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-\u2212])?(?:{_DIGITS})(?:[eE][-+\u2212]?\d+)?(?![\d])")


def _spelled(number: str) -> str:
    """One spelling for one value: no separators, no exponent, no zeros at the end of a fraction."""
    plain = re.sub(r"[^\d.eE+-]", "", number.replace("\u2212", "-"))
    try:
        value = Decimal(plain)
    except InvalidOperation:  # an exponent that no machine holds
        return plain
    if abs(value.adjusted()) > 64:
        return str(value.normalize())
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def last_number(text: str) -> str | None:
    """The last number of a text, in one spelling: "$1,234.50" is "1234.5", ".5" is "0.5", "1e3" is
    "1000".

    A minus counts (also \u2212) unless a word or number stands right before it: the last of "10-20"
    is "20". Commas and thin blanks are left out where they set three digits apart, and part two
    numbers elsewhere. None where there is no number.
    """
    found: list[str] = _NUMBER.findall(text)
    return _spelled(found[-1]) if found else None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` that is closed, braces counted; None where there is
    none, or nothing.

    A number, with a currency or percent sign or not, is given in the spelling of `last_number`;
    anything else as it stands, without blanks around it.
    """
    last, open_braces = (0, 0), list[int]()
    boxes = {found.end() for found in re.finditer(r"\\boxed\s*\{", text)}
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.end())
        elif open_braces:
            begin = open_braces.pop()
            last = max(last, (begin, brace.start())) if begin in boxes else last
    if not last[0]:
        return None
    inside = text[slice(*last)].strip()
    bare = re.sub(r"^\\?\$|\\?%$|\$$", "", inside).strip()
    return _spelled(bare) if _NUMBER.fullmatch(bare) else inside or None


def matching(pattern: str) -> Callable[[str], str | None]:
    """An extractor: the last match of a regular expression, its first group where it has one, as it
    stands.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InvalidInput(
            f"pattern: got {pattern!r}, no regular expression ({error}); expected one, e.g. 'x = "
            "(.*)'"
        ) from error

    def extract(text: str) -> str | None:
        found = list(compiled.finditer(text))
        return None if not found else found[-1].group(1 if compiled.groups else 0)

    return extract
