"""Finds control words in what a thread writes, however its tokenizer splits them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import regex  # type: ignore[import-untyped]  # comes with transformers

from apr.errors import InvalidInput
from apr.loop.text import continued
from apr.protocols.grammar import Part

_WINDOW = 48  # tokens; a control word that is spelled with more is not found


class Words:
    """The control words of a run, and the tokens that can complete one."""

    def __init__(self, tokenizer: Any, words: Iterable[str | None]) -> None:
        self.tokenizer = tokenizer
        self.words = sorted({w for w in words if w})
        for word in self.words:
            if word != word.strip():
                raise InvalidInput(
                    f"grammar: the control word {word!r} begins or ends with a blank, which "
                    "tokenizers merge; leave it out"
                )
            if word not in self.decode(self.encode(word)):
                raise InvalidInput(
                    f"grammar: this tokenizer cannot spell {word!r}; use a grammar whose words the "
                    "model knows"
                )
        try:
            added = tokenizer.added_tokens_decoder
        except NotImplementedError:  # mistral-common's, which makes no special token of text
            added = {}
        named = {
            i: token.content
            for i, token in added.items()
            if token.special or token.content in self.words
        }
        self._special = frozenset(named)
        # Where one of them begins; nothing matches where there are none.
        self._named = regex.compile("|".join(map(regex.escape, named.values())) or r"(?!)")
        last = {word[-1] for word in self.words}
        # Vocabularies spell ASCII as it is, and other characters in ways of their own; "}" ends a
        # field.
        plain = all(c.isascii() and c != "}" for c in last)
        spelled = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) if plain else []
        self._enders = (
            frozenset(i for i, t in enumerate(spelled) if t and not last.isdisjoint(t))
            if plain
            else None
        )

    def may_end(self, token: int) -> bool:
        """Whether a word can end in this token; decoding tells."""
        return self._enders is None or token in self._enders

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of text that continues other text: without the blank that some tokenizers begin
        with.
        """
        return continued(self.tokenizer, text)

    def spell(self, parts: Sequence[Part]) -> list[int]:
        """The same for text of several parts. What threads have written is text: a special token
        that it names is spelled with others, so that nobody reads it as the grammar's word.
        """
        whole = self.encode("".join(part.text for part in parts))
        own = [self.encode(part.text) for part in parts if not part.written]
        if self._specials(whole) == sum(map(self._specials, own)):
            return whole
        return [
            i
            for part in parts
            for i in (self._plainly(part.text) if part.written else self.encode(part.text))
        ]

    def _specials(self, ids: Sequence[int]) -> int:
        return sum(i in self._special for i in ids)

    def _plainly(self, text: str) -> list[int]:
        """Text without special tokens: cut behind the first character of each that it names, or,
        where a tokenizer finds some in other spellings, behind every character.
        """
        ids = self.encode(text)
        if self._specials(ids):
            found = self._named.finditer(text, overlapped=True)
            cuts = [0, *(match.start() + 1 for match in found), len(text)]
            ids = [i for begin, end in pairwise(cuts) for i in self.encode(text[begin:end])]
        if self._specials(ids):
            ids = [i for character in text for i in self.encode(character)]
        return ids

    def spellings(self, word: str) -> list[list[int]]:
        """The ways in which a tokenizer spells a word by itself and behind other text."""
        return [list(ids) for ids in {tuple(self.encode(word)), tuple(self._ids(word))}]

    def decode(self, ids: Sequence[int]) -> str:
        """Text with control words in it."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def plain(self, ids: Sequence[int]) -> str:
        """Text without the tokens that begin, end and pad sequences; control words stay."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        framing = {getattr(self.tokenizer, name, None) for name in names}
        return self.decode([i for i in ids if i not in framing])


class Watcher:
    """Tells which control words each token of one thread completes."""

    def __init__(self, words: Words, extra: str | None = None) -> None:
        self._words = words
        self._all = words.words if extra is None or extra in words.words else [*words.words, extra]
        self._tail: list[int] = []

    def feed(self, token: int) -> list[str]:
        """The words that end in `token`."""
        before = self._tail
        self._tail = [*before[-_WINDOW + 1 :], token]
        if not self._words.may_end(token):
            return []
        old, new = self._words.decode(self._tail[:-1]), self._words.decode(self._tail)
        return [word for word in self._all if new.count(word) > old.count(word)]

    def forget(self) -> None:
        """What was put in is not a word of the model's; it starts anew."""
        self._tail = []

    def length(self, word: str) -> int:
        """How many of the last tokens spell the word that was just completed."""
        for n in range(1, len(self._tail) + 1):
            if word in self._words.decode(self._tail[-n:]):
                return n
        return len(self._tail)
