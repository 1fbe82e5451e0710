"""Answer a file of prompts, each exactly once: it may be stopped and started again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from apr.commands._lines import Answers, Line, read_prompts
from apr.commands._methods import METHODS, run_method
from apr.commands._models import add_model_arguments, check_model_arguments, opened
from apr.commands.run import parse_problem
from apr.errors import Error, InvalidInput
from apr.hf.world import is_first_rank, num_ranks, same_everywhere

_THREADS = 256  # that write side by side
_HOPELESS = 4  # prompts that fail alike before any is answered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--in", dest="prompts", type=Path, required=True, help='lines of {"id": 1, "prompt": "..."}'
    )
    parser.add_argument("--out", type=Path, required=True, help="answers, a JSON object a line")
    parser.add_argument("--method", choices=METHODS, default="majority_vote")
    parser.add_argument("--n", type=int, default=16, help="threads a prompt")
    parser.add_argument("--workers", type=int, default=3, help="of hogwild and group_think")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--chat", action="store_true", help="send texts as chat messages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=int, metavar="WORKERS", help="on a Ray cluster, so many")


def main(options: argparse.Namespace) -> None:
    for name in ("n", "workers", "max_new_tokens", *(("ray",) if options.ray is not None else ())):
        if getattr(options, name) < 1:
            shown = name.replace("_", "-")
            raise InvalidInput(f"--{shown}: got {getattr(options, name)}; expected at least 1")
    if not options.temperature > 0:
        raise InvalidInput(f"--temperature: got {options.temperature}; expected above 0")
    check_model_arguments(options)
    lines, bad = read_prompts(options.prompts)
    if options.out.exists() and options.out.samefile(options.prompts):
        raise InvalidInput("--out: got the file of --in; expected another one")
    if not options.model and not options.engine:
        lines, bad = _as_problems(lines, bad)
    if not is_first_rank():
        work: list[list[Line]] = same_everywhere(None)
        for _ in answered(options, work):
            pass
        return
    console = Console(stderr=True)
    with Answers(options.out, _settings(options)) as answers:
        chunks = _chunks(lines, {x.index for x in answers.missing(lines)}, options.n)
        same_everywhere(chunks)
        failed: dict[int, str] = {}
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        new = 0
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("prompts", total=len(lines), completed=len(answers.done))
            for told in _made(options, chunks):
                new += answers.write((line, t) for line, t in told if "error" not in t)
                lost = {line.index: t["error"] for line, t in told if "error" in t}
                failed |= {i: why for i, why in lost.items() if i not in answers.done}
                progress.update(bar, completed=len(answers.done) + len(failed))
                same = len(set(failed.values())) == 1 and len(failed) >= _HOPELESS
                if same and not new and num_ranks() == 1:
                    break  # all for one reason, as where nobody serves
    _report(options, bad, failed, len(answers.done), new)


def _report(
    options: argparse.Namespace, bad: list[str], failed: dict[int, str], answered: int, new: int
) -> None:
    """Say what was done; raises Error where starting again may help, or nothing was answered."""
    bad = bad + [f"line {index + 1}: {why}" for index, why in failed.items()]
    for why in bad:
        print(f"apr: {why}", file=sys.stderr)
    print(f"{answered} answers in {options.out}, {new} of them new; {len(bad)} lines without one")
    may_pass = any(not why.startswith(InvalidInput.__name__) for why in failed.values())
    if may_pass or (failed and not answered):
        raise Error(f"{len(failed)} prompts were not answered, for the reasons above; start again")


def _settings(options: argparse.Namespace) -> str:
    names = ("model", "tokenizer", "method", "n", "workers", "max_new_tokens", "temperature")
    told = {name: getattr(options, name) for name in (*names, "chat", "seed")}
    told["engine"] = bool(options.engine)  # it may stand elsewhere tomorrow
    return repr(told)


def _as_problems(lines: list[Line], bad: list[str]) -> tuple[list[Line], list[str]]:
    """Countdown problems, as the shipped model reads them."""
    good = []
    for line in lines:
        try:
            good.append(Line(line.index, line.id, parse_problem(str(line.prompt)).prompt))
        except InvalidInput as error:
            bad.append(f"line {line.index + 1}: {error}".replace("--prompt: ", ""))
    return good, bad


def _chunks(lines: Sequence[Line], missing: set[int], n: int) -> list[list[Line]]:
    """What is run together: always the same lines, so that answers do not depend on what was there
    before; those of which nothing is missing are left out.
    """
    size = max(1, _THREADS // n)
    whole = [list(lines[i : i + size]) for i in range(0, len(lines), size)]
    return [chunk for chunk in whole if any(line.index in missing for line in chunk)]


def _made(
    options: argparse.Namespace, chunks: list[list[Line]]
) -> Iterator[list[tuple[Line, dict[str, Any]]]]:
    if options.ray is None:
        return answered(options, chunks)
    from apr.commands._ray import answered_by_ray

    return answered_by_ray(options, chunks)


def answered(
    options: argparse.Namespace, chunks: Sequence[list[Line]]
) -> Iterator[list[tuple[Line, dict[str, Any]]]]:
    """Each chunk's answers: what the result says, or an "error"."""
    if not chunks:
        return
    with opened(options) as (session, tokenizer):
        for chunk in chunks:
            yield answer_chunk(options, session, tokenizer, chunk)


def answer_chunk(
    options: argparse.Namespace, session: Any, tokenizer: Any, chunk: list[Line]
) -> list[tuple[Line, dict[str, Any]]]:
    """One chunk's answers; where together they fail, each by itself."""
    try:
        return list(zip(chunk, _run(options, session, tokenizer, chunk), strict=True))
    except Error as error:
        if len(chunk) == 1:
            return [(chunk[0], {"error": f"{type(error).__name__}: {error}"})]
    return [told for x in chunk for told in answer_chunk(options, session, tokenizer, [x])]


def _run(
    options: argparse.Namespace, session: Any, tokenizer: Any, chunk: list[Line]
) -> list[dict[str, Any]]:
    asked = argparse.Namespace(**vars(options))
    asked.prompt = [line.prompt for line in chunk]
    # Another seed for each, whatever stands beside it in the file.
    asked.seed = options.seed * 1_000_003 + chunk[0].index
    countdown = not options.model
    results = run_method(asked, session, tokenizer, None, lambda step: None, countdown)
    return [
        {
            "answer": result.answer,
            "text": result.text,
            "votes": [[answer, count] for answer, count in result.votes.items()],
            "tokens": result.total_tokens,
            "critical_path_tokens": result.critical_path_tokens,
        }
        for result in results
    ]
