"""What a server takes, measured by asking it; and a generation configuration as fields of a
request.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from apr.errors import EngineError, InvalidInput
from apr.loop.sampling import eos_tokens
from apr.remote.request import passes, pause

# More than any vocabulary: no top-k. Servers differ in the number that switches it off.
_ALL = 1 << 20

# Fields that change what is sampled, beyond those that every server takes; the value that does not.
_BEYOND: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
}
_OFTEN = {"top_k": (None, 0), "min_p": (None, 0.0), "repetition_penalty": (None, 1.0)}


@dataclass(frozen=True)
class Dialect:
    """How one server is spoken to.

    extras: "fields", top_k and its like are fields of their own (vLLM, SGLang, llama.cpp);
    "generation_config", they go into one (transformers); "none". takes_ids: prompts may be token
    ids. tells_ids: it tells the ids that it sampled. tells_logprobs: and their log-probabilities.
    """

    extras: str
    takes_ids: bool = False
    tells_ids: bool = False
    tells_logprobs: bool = False


async def listen(client: Any, model: str, ids: list[int], text: str, retries: int) -> Dialect:
    """Ask a server for one token, with the sampling fields of requests, in one way after the other,
    until it answers.

    Raises EngineError with its last words where it never does.
    """
    said: Exception | None = None
    for extras in ("fields", "generation_config", "none"):
        fields = request_fields(GenerationConfig(), Dialect(extras, tells_ids=True))
        for prompt in (ids, text):
            asked = {"model": model, "prompt": prompt, "max_tokens": 1, "logprobs": 1, **fields}
            answer, said = await _ask(client, retries, asked)
            if answer is not None:
                choice = answer.choices[0]
                told = choice.logprobs is not None and bool(choice.logprobs.token_logprobs)
                tells_ids = bool(getattr(choice, "token_ids", None))
                return Dialect(extras, prompt is ids, tells_ids, told)
    raise EngineError(
        f"engine: {client.base_url} takes no request of /completions for the model {model!r}: "
        f"{said}; expected a server with the completions of OpenAI (vLLM, SGLang, llama.cpp, "
        "transformers serve) and the name that it has for the model"
    ) from said


async def _ask(client: Any, retries: int, asked: dict[str, Any]) -> tuple[Any, Exception | None]:
    """An answer, or why the server does not take this; raises EngineError where there is no
    server.
    """
    from openai import APIStatusError

    failed: Exception | None = None
    for attempt in range(max(retries, 1) + 1):
        if attempt:
            await pause(attempt, failed)
        try:
            return await client.completions.create(**asked), None
        except Exception as error:
            # Some servers say 500 to what they do not take, and to it again.
            status = error.status_code if isinstance(error, APIStatusError) else 0
            if status in (400, 422, 501) or (status == 500 and attempt):
                return None, error
            if not passes(error):
                raise EngineError(f"engine: {client.base_url}: {error}") from error
            failed = error
    raise EngineError(
        f"engine: no server answers at {client.base_url}: {failed!r}; start it, or look at the URL"
    ) from failed


def request_fields(config: GenerationConfig, dialect: Dialect) -> dict[str, Any]:
    """The sampling fields of a request; raises InvalidInput for what the server cannot honour."""
    fields: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0}
    if config.do_sample:
        fields["temperature"] = 1.0 if config.temperature is None else float(config.temperature)
        fields["top_p"] = 1.0 if config.top_p is None else float(config.top_p)
    harmless = _BEYOND if dialect.extras == "fields" else {**_BEYOND, **_OFTEN}
    asked = {n: getattr(config, n, None) for n, v in harmless.items()}
    asked = {n: value for n, value in asked.items() if value not in harmless[n]}
    if asked and dialect.extras != "generation_config":
        raise InvalidInput(
            f"generation options {sorted(asked)} are not taken by this server; leave them out, or "
            "use an apr.Session on a model of your own"
        )
    if dialect.extras == "fields":
        penalty = config.repetition_penalty or 1.0
        fields["extra_body"] = {
            "top_k": config.top_k or _ALL if config.do_sample else _ALL,
            "min_p": (config.min_p or 0.0) if config.do_sample else 0.0,
            "repetition_penalty": penalty,
            "repeat_penalty": penalty,
            "skip_special_tokens": False,
            "return_token_ids": dialect.tells_ids,
        }
    elif dialect.extras == "generation_config":
        told = {"do_sample": bool(config.do_sample), "top_k": 0, **asked}
        fields["extra_body"] = {"generation_config": json.dumps(told)}
    return fields


def check_ends(config: GenerationConfig, tokenizer: Any) -> None:
    """Raise InvalidInput where the configuration does not end where a server does."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and end not in eos_tokens(config):
        raise InvalidInput(
            f"eos_token_id: got {config.eos_token_id!r}; a server ends where its model does, with "
            f"{end}: leave it out, or keep that among them"
        )
