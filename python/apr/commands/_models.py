"""The model that a command runs: a folder or hub id, a part of it under torchrun, or a server's."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

import apr
from apr import countdown, hf
from apr.errors import InvalidInput
from apr.hf.world import num_ranks
from apr.ops.codes import KV_DTYPES


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder or hub id; without it, the Countdown model")
    parser.add_argument(
        "--max-tokens", type=int, help="with --model: of the pool; else by free memory"
    )
    parser.add_argument(
        "--kv-dtype",
        choices=list(KV_DTYPES),
        help="with --model: keys and values in 8 bits",
    )
    parser.add_argument(
        "--device",
        help='with --model: "cuda", "cuda:1"; "auto" lays layers out over all GPUs (accelerate)',
    )
    parser.add_argument("--engine", help="the URL of a server, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--tokenizer", help="with --engine: a folder or hub id, where --model is none"
    )


def check_model_arguments(options: argparse.Namespace) -> None:
    """Raise InvalidInput where they do not fit together."""
    if options.engine and not options.model:
        raise InvalidInput("--engine: needs --model, the name that the server has for it")
    if num_ranks() > 1 and (options.engine or getattr(options, "ray", None)):
        raise InvalidInput("--engine and --ray: each rank would ask for all; run without torchrun")
    here = (options.max_tokens, options.kv_dtype, options.device)
    if here != (None, None, None) and (options.engine or not options.model):
        raise InvalidInput("--max-tokens, --kv-dtype, --device: go with --model, which runs here")
    if options.engine and options.method == "adaptive":
        raise InvalidInput("--engine: the adaptive model is its own, and runs here; leave it out")
    if options.tokenizer and not options.engine:
        raise InvalidInput("--tokenizer: goes with --engine; a model of yours brings its own")


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """(a session or an engine, its tokenizer)."""
    if options.engine:
        name = options.tokenizer or options.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"--tokenizer: {name!r} cannot be loaded: {error}") from error
        with apr.remote.Engine(
            options.engine,
            options.model,
            seed=options.seed,
            concurrency=64,
            logprobs=options.method == "best_of_n",
        ) as engine:
            yield engine, tokenizer
        return
    if options.model:
        model, tokenizer = hf.load(options.model, ranks=num_ranks(), device=options.device)
    else:
        model, tokenizer = hf.load(str(countdown.CHECKPOINT), torch.float32, num_ranks())
    kept = None if options.kv_dtype is None else KV_DTYPES[options.kv_dtype]
    with apr.Session(model, options.max_tokens, seed=options.seed, kv_dtype=kept) as session:
        yield session, tokenizer
