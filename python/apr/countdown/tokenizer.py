"""The Countdown tokenizer: one token a number, an operator or a control word, split at blanks."""

from __future__ import annotations

from typing import Any

LARGEST_NUMBER = 127
CONTROL = ["<pad>", "<bos>", "<eos>", "<unk>", "<try>", "<spawn>", "<join>", "<found>", "<none>"]
CONTROL += ["<parallel>", "<sequential>", "<ok>", "<miss>"]
# One edge token for each first operation of a four-number problem (6 pairs x 4 operators), so that
# a model can name the sub-problem of a child in one token.
EDGES = [f"e{i}" for i in range(24)]
WORDS = [*CONTROL, ":", "+", "-", "*", "/", "=", "x", "#", *EDGES]
WORDS += [str(n) for n in range(LARGEST_NUMBER + 1)]
# The other first operations of a five-number problem; behind the numbers, so that older checkpoints
# keep their ids.
WORDS += [f"e{i}" for i in range(24, 40)]


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` over `WORDS`; it needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
