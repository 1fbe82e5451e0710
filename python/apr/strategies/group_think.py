"""Group Think (arXiv 2505.11107): thinkers that see each other's tokens up to the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apr.decode import Decoded, decode
from apr.errors import InvalidInput
from apr.sampling import new_token_limit, resolve
from apr.session import Session
from apr.strategies._live import Crew, joint_answer
from apr.strategies._requests import Result, encode_plain, run_requests
from apr.strategies._sample import check_count

LAYOUTS = ("slots", "interleaved")


def group_think(
    model_or_session: Any,
    tokenizer: Any,
    prompt: Any,
    n: int = 4,
    generation_config: Any = None,
    seed: int = 0,
    *,
    layout: str = "slots",
    starts: Sequence[Any] | None = None,
    answer_prompt: Any = "\nFinal answer:",
    answer_tokens: int = 64,
    **options: Any,
) -> Any:
    """`n` thinkers write at once; each sees the prompt, what the others wrote before this step, and itself.

    layout: "slots" gives each thinker a range of positions of its own behind the prompt; "interleaved" lets
    token i of thinker k stand at prompt + i * n + k. Positions are those of the writing, so models without
    re-rotation do too. starts: what each begins with (text or token ids), "\\nThinker 1:" and so on if not
    given. When all have ended, a reader of all of them writes the answer after `answer_prompt` (None: no
    answer is written, and the text is the first thinker's). Other arguments: as in `majority_vote`.
    """
    check_count(n)
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout: got {layout!r}; expected one of {LAYOUTS}")
    named = starts if starts is not None else [f"\nThinker {i + 1}:" for i in range(n)]
    if len(named) != n:
        raise InvalidInput(f"starts: got {len(named)} for {n} thinkers; expected one each")
    begins = [encode_plain(tokenizer, start) for start in named]
    if not all(begins):
        raise InvalidInput("starts: got one without tokens; expected at least one token each")

    def enter(session: Session, ids: list[int], request: int, slot: int) -> Crew:
        head, p = session.segment(ids), len(ids)
        regions = [
            session.region(base=p + i * slot)
            if layout == "slots"
            else session.region(base=p + i, stride=n)
            for i in range(n)
        ]
        threads = []
        for i, region in enumerate(regions):
            others = [(r, r.base) for r in regions if r is not region]
            thread = session.thread(
                begins[i],
                view=[(head, 0), *others, (region, region.base)],
                writes=region,
                request=(seed, request, i),
            )
            threads.append(thread)
        return Crew(head, regions, threads)

    def run(session: Session, prompts: list[list[int]], requests: list[int]) -> list[Result]:
        sampling = options if generation_config is not None else {"do_sample": True, **options}
        config_options = {k: v for k, v in sampling.items() if k not in _LOOP_OPTIONS}
        limit = new_token_limit(resolve(session.model, generation_config, config_options), 0)
        slot = max(map(len, begins)) + limit
        crews: list[Crew] = []
        try:
            for ids, request in zip(prompts, requests, strict=True):
                crews.append(enter(session, ids, request, slot))
            everyone = [t for crew in crews for t in crew.threads]
            written = decode(session, everyone, generation_config, tokenizer=tokenizer, **sampling)
            groups = [written[i : i + n] for i in range(0, len(written), n)]
            answers = joint_answer(
                session,
                tokenizer,
                crews,
                answer_prompt,
                answer_tokens,
                sampled_by(session, config_options),
            )
            stats = session.stats
        finally:
            for crew in crews:
                crew.release()
        return [
            _result(group, answer, request, stats, session)
            for group, answer, request in zip(groups, answers, requests, strict=True)
        ]

    return run_requests(model_or_session, tokenizer, prompt, seed, n, run)


_LOOP_OPTIONS = {
    "stop",
    "on_step",
    "progress",
    "streamer",
    "prune",
    "logits_processor",
    "stopping_criteria",
}


def sampled_by(session: Session, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the answer: greedy, with the end tokens that were asked for."""
    kept = {k: v for k, v in options.items() if k in ("eos_token_id", "pad_token_id")}
    return {**kept, "do_sample": False}


def _result(
    group: list[Decoded], answer: Decoded | None, request: int, stats: Any, session: Session
) -> Result:
    for item in group:
        item.request = request
    text = group[0].text if answer is None else answer.text
    return Result(text=text, answer=text, threads=group, stats=stats, trace=session.trace)
