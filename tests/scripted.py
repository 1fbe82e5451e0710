"""A model that writes what a test says, and the stock forward of what it wrote as an oracle."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import models as families
from apr.protocols.replays import replay
from apr.training import flatten

WORDS = [
    "<Parallel>",
    "</Parallel>",
    "<Goal>",
    "</Goal>",
    "<Outline>",
    "</Outline>",
    "<Path>",
    "</Path>",
    "<Conclusion>",
    "</Conclusion>",
    "<Summary>",
    "</Summary>",
    "<Outlines>",
    "</Outlines>",
    "<Thread>",
    "</Thread>",
    "<guideline>",
    "</guideline>",
    "<plan>",
    "</plan>",
    "<step>",
    "</step>",
    "<takeaway>",
    "</takeaway>",
    "<async>",
    "</async>",
    "<sync/>",
    "<Plan>",
    "</Plan>",
    "<prompt>",
    "</prompt>",
    "<execution>",
    "</execution>",
    "<Execution>",
    "</Execution>",
    "<call>",
    "</call>",
    "<result>",
    "</result>",
    "<think1>",
    "</think1>",
    "<think2>",
    "</think2>",
    "<think3>",
    "</think3>",
    "<summary>",
]


def tokenizer(whole=tuple(WORDS[::2])):
    """Byte-level, without merges; `whole` are tokens: by default half of the control words, the
    rest is spelled.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    vocabulary |= {c: i + 3 for i, c in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.add_tokens(list(whole), special_tokens=True)
    return made


def model(tok, seed=1, name="llama"):
    return families.build(name, seed, vocab_size=len(tok), eos_token_id=tok.eos_token_id)


def play(session, tok, prompt, grammar, script, budget=None):
    """Run a script of texts by path; an outcome and the logits of every thread."""
    ids = {path: tok(text, add_special_tokens=False).input_ids for path, text in script.items()}
    thread = session.thread(tok(prompt).input_ids)
    try:
        played = replay(session, thread, grammar, ids, tokenizer=tok, budget=budget)
    except BaseException:
        thread.release()
        raise
    return played.outcome, played.logits


@torch.no_grad()
def flat_logits(net, record):
    """Stock logits of the flat sequence, at the places that the sampled tokens were chosen from, by
    piece.
    """
    flat = flatten(record)
    out = net(
        input_ids=flat.ids[None],
        position_ids=flat.position_ids[None],
        attention_mask=flat.mask()[None, None],
        use_cache=False,
    ).logits[0]
    piece = flat.piece[flat.targets].tolist()
    rows: dict[int, list] = {}
    for where, row in zip(piece, out[flat.sources], strict=True):
        rows.setdefault(where, []).append(row)
    return rows


def distances(net, outcome, logits):
    """The largest difference of each thread's logits from the oracle's; every sampled token is
    compared.
    """
    rows = flat_logits(net, outcome.record)
    found = {}

    def visit(branch):
        theirs = [row for piece in branch.pieces for row in rows.get(piece, [])]
        ours = logits.get(branch.path)
        if theirs:
            assert len(theirs) == len(ours), (branch.path, len(theirs), len(ours))
            theirs, closed = torch.stack(theirs), ours.isinf()  # the opening word at a limit
            assert closed.sum(1).max() <= 2  # by itself, and behind other text
            found[branch.path] = families.distance(theirs[~closed], ours[~closed])
        for child in branch.children:
            visit(child)

    visit(outcome.root)
    return found


def check(net, outcome, logits):
    """The record is what the runtime did, whatever the limit or the end was."""
    assert max(distances(net, outcome, logits).values()) < families.CLOSE
