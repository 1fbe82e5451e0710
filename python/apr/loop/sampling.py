"""GenerationConfig -> logits processors, options of the sampler and stopping rules, by
transformers' public classes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from apr.errors import InvalidInput
from apr.hf.ranks import Ranks

DEFAULT_NEW_TOKENS = 256
UNSET_LENGTH = GenerationConfig().max_length

# Fields that name a way of decoding which a loop over threads does not do; the value that is
# harmless.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "dola_layers": (None,),
    "top_h": (None,),
    "token_healing": (None, False),
}
_OUTPUTS = {
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "cache_implementation",
}
# Fields that mean nothing unless tokens are drawn.
_WARPING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_INSTEAD = {
    "num_return_sequences": "fork the thread, or model.generate(past_key_values=apr.Cache(model))",
    "num_beams": "leave it at 1",
}


def resolve(
    model: Any,
    config: GenerationConfig | None,
    overrides: dict[str, Any],
    sample: bool | None = None,
) -> GenerationConfig:
    """The configuration in force: keyword overrides, then `config`, then the model's own; checked.

    As in generate(), a field that is None in `config` is taken from the model's configuration.
    Unlike there, nothing is put where both are silent (generate() would sample with top_k=50).
    sample: whether to sample where neither overrides nor `config` say; None: as the model's
    configuration says, and where it is silent too, sampling if a temperature or its like is asked
    for.
    """
    overrides = _plain(overrides)
    own = getattr(model, "generation_config", None)
    fields = GenerationConfig().to_dict() | (own.to_dict() if own is not None else {})
    asked = {} if config is None else _plain(config.to_dict())
    asked = {name: value for name, value in asked.items() if value is not None}
    known = set(fields) | set(GenerationConfig().to_dict())
    for name in overrides:
        if name not in known:
            raise InvalidInput(
                f"generation option {name!r} is not a field of GenerationConfig; check its "
                f"spelling (what a chat template takes goes into chat_template_kwargs={{{name!r}: "
                "...} of a method)"
            )
    for name in _OUTPUTS & {n for n, value in overrides.items() if value}:
        raise InvalidInput(
            f"generation option {name!r} belongs to generate(); here steps return tokens and "
            "logprobs"
        )
    asked |= overrides
    merged = {**fields, **asked}
    if asked.get("do_sample") is None:
        warms = any(asked.get(name) is not None for name in _WARPING)
        merged["do_sample"] = sample if sample is not None else warms or bool(merged["do_sample"])
    for name, harmless in _UNSUPPORTED.items():
        value = merged.get(name)
        if value is not None and value not in harmless:
            raise InvalidInput(
                f"GenerationConfig.{name}={value!r} is not supported here; "
                f"{_INSTEAD.get(name, f'leave it at {harmless[-1]!r}')}"
            )
    try:
        return GenerationConfig(**merged)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"generation options: {error}") from error


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Tensors and arrays (end tokens come as such) as numbers and lists."""
    return {n: v.tolist() if hasattr(v, "tolist") else v for n, v in fields.items()}


def eos_tokens(config: GenerationConfig) -> list[int]:
    ids = config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else [int(i) for i in ids]


def history_processors(
    config: GenerationConfig, prompt: int, device: torch.device
) -> list[LogitsProcessor]:
    """The processors of a configuration that read a thread's own history, in transformers' order.

    They keep no state: threads that began with as many visible tokens may share them.
    """
    try:
        return _history_processors(config, prompt, device)
    except ValueError as error:
        raise InvalidInput(f"generation options: {error}") from error


def _history_processors(
    config: GenerationConfig, prompt: int, device: torch.device
) -> list[LogitsProcessor]:
    eos = torch.tensor(eos_tokens(config), device=device)
    made: list[LogitsProcessor] = []
    if config.sequence_bias is not None:
        made.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        made.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        made.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos if len(eos) else None))
    if config.min_length and len(eos):
        made.append(MinLengthLogitsProcessor(config.min_length, eos, device=str(device)))
    if config.min_new_tokens and len(eos):
        made.append(
            MinNewTokensLengthLogitsProcessor(
                prompt, config.min_new_tokens, eos, device=str(device)
            )
        )
    if config.forced_eos_token_id is not None:
        made.append(
            ForcedEOSTokenLogitsProcessor(
                prompt + new_token_limit(config, prompt),
                config.forced_eos_token_id,
                device=str(device),
            )
        )
    if config.remove_invalid_values:
        made.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        made.append(
            ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, prompt)
        )
    if config.suppress_tokens is not None:
        made.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=str(device)))
    if config.begin_suppress_tokens is not None:
        made.append(
            SuppressTokensAtBeginLogitsProcessor(
                config.begin_suppress_tokens, prompt, device=str(device)
            )
        )
    return made


def _row_warpers(config: GenerationConfig, device: torch.device) -> list[LogitsProcessor]:
    """The processors that look at a row of scores alone: one call serves all threads."""
    made: list[LogitsProcessor] = []
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            made.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k:
            made.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            made.append(TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            made.append(MinPLogitsWarper(config.min_p))
        if config.typical_p is not None and config.typical_p < 1.0:
            made.append(TypicalLogitsWarper(config.typical_p))
        if config.epsilon_cutoff is not None and 0.0 < config.epsilon_cutoff < 1.0:
            made.append(EpsilonLogitsWarper(config.epsilon_cutoff))
        if config.eta_cutoff is not None and 0.0 < config.eta_cutoff < 1.0:
            made.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    if config.renormalize_logits:
        made.append(LogitNormalization())
    return made


def new_token_limit(config: GenerationConfig, prompt: int) -> int:
    """Most tokens that a thread with `prompt` visible tokens may write."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is not None and config.max_length != UNSET_LENGTH:
        return max(0, int(config.max_length) - prompt)
    return DEFAULT_NEW_TOKENS


@dataclass(eq=False)
class Rules:
    """How one thread is sampled and when it stops."""

    config: GenerationConfig
    limit: int
    eos: frozenset[int]
    shared: list[
        LogitsProcessor
    ]  # of the configuration, as for other threads of this prompt length
    own: list[LogitsProcessor]  # that the user gave, for this thread
    warpers: LogitsProcessorList
    draw: dict[str, float] | None  # the warpers as the sampler's options; None: it has not all
    criteria: StoppingCriteriaList
    deadline: float | None
    stop: Callable[[list[int]], bool] | None = None
    tokens: list[int] = field(default_factory=list)  # written so far
    ending: int | None = None  # with so many tokens it ends
    samples: bool = True  # at random

    @property
    def ended(self) -> bool:
        """Whether the thread has taken the token that it ends with."""
        return self.ending == len(self.tokens)

    @property
    def history(self) -> list[LogitsProcessor]:
        """The processors that read what the thread has written, in order."""
        return [*self.shared, *self.own]

    @property
    def reads_history(self) -> bool:
        """Whether processors or criteria look at its token ids."""
        return bool(self.shared or self.own or self.criteria)

    def warped(self, scores: Tensor) -> Tensor:
        """Scores [1, vocab] as a token was chosen by them."""
        if self.draw is None:
            return scores
        warped: Tensor = self.warpers(None, scores.to(torch.float32, copy=True))
        return warped

    def finish_reason(
        self,
        written: list[int],
        token: int,
        late: bool,
        all_tokens: Callable[[], Tensor] | None = None,
        scores: Callable[[], Tensor] | None = None,
    ) -> str | None:
        """Why the thread ends with `token` after those `written`, or None; where it has criteria
        they read all_tokens() [1, length] and scores() [1, vocab] that the token was chosen by.
        late: whether its time is over (`late_ones`).
        """
        if token in self.eos:
            return "eos"
        if self.stop is not None and self.stop([*written, token]):
            return "stop"
        if self.criteria:
            assert all_tokens is not None and scores is not None
            # transformers' list of criteria answers a tensor, a single one may answer a bool.
            if bool(torch.as_tensor(self.criteria(all_tokens(), scores())).any()):
                return "stop"
        if len(written) + 1 >= self.limit:
            return "length"
        return "time" if late else None


def late_ones(every: Sequence[Rules], ranks: Ranks) -> list[bool]:
    """Which are past their deadline; of several ranks the first one's clock tells."""
    now = time.monotonic()
    late = [rules.deadline is not None and now > rules.deadline for rules in every]
    if all(rules.deadline is None for rules in every):
        return late
    told: list[bool] = ranks.first(torch.tensor(late, device="cpu")).tolist()
    return told


def make_rules(
    config: GenerationConfig,
    prompt: int,
    device: torch.device,
    *,
    warpers: LogitsProcessorList | None = None,
    shared: list[LogitsProcessor] | None = None,
    tokenizer: Any = None,
    stop: Sequence[str] | Callable[[list[int]], bool] | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[Any] = (),
) -> Rules:
    """Rules of one thread that starts with `prompt` visible tokens."""
    strings = list(config.stop_strings or ())
    if isinstance(config.stop_strings, str):
        strings = [config.stop_strings]
    if stop is not None and not callable(stop):
        strings += [stop] if isinstance(stop, str) else list(stop)
    criteria = StoppingCriteriaList(stopping_criteria)
    if strings:
        if tokenizer is None:
            raise InvalidInput(f"stop strings {strings} need a tokenizer; pass tokenizer=...")
        try:
            criteria.append(StopStringCriteria(tokenizer, strings))
        except ValueError as error:
            raise InvalidInput(
                f"stop strings {strings}: this tokenizer cannot spell arbitrary text ({error}); "
                "pass stop=a callable on the written token ids"
            ) from error
    limit = new_token_limit(config, prompt)
    if limit < 1:
        raise InvalidInput(
            f"generation: a thread of {prompt} tokens leaves {limit} new ones; expected at least "
            "1: raise max_new_tokens (or max_length)"
        )
    return Rules(
        config=config,
        limit=limit,
        eos=frozenset(eos_tokens(config)),
        shared=history_processors(config, prompt, device) if shared is None else shared,
        own=list(logits_processor),
        warpers=warpers if warpers is not None else row_warpers(config, device),
        draw=draw_options(config),
        criteria=criteria,
        samples=bool(config.do_sample),
        deadline=None if config.max_time is None else time.monotonic() + config.max_time,
        stop=stop if callable(stop) else None,
    )


def row_warpers(config: GenerationConfig, device: torch.device) -> LogitsProcessorList:
    """Temperature, top-k, top-p and their like, to be called once for all threads of a
    configuration.
    """
    try:
        return LogitsProcessorList(_row_warpers(config, device))
    except ValueError as error:
        raise InvalidInput(f"generation options: {error}") from error


def draw_options(config: GenerationConfig) -> dict[str, float] | None:
    """The options of `ops.Draws` that do what the configuration's warpers do; None where they do
    more than the sampler can.
    """
    if not config.do_sample:
        return {"temperature": 0.0}
    cuts = (config.typical_p, 1.0), (config.epsilon_cutoff, 0.0), (config.eta_cutoff, 0.0)
    if any(value not in (None, harmless) for value, harmless in cuts):
        return None
    return {
        "temperature": 1.0 if config.temperature is None else float(config.temperature),
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else min(config.top_p, 1.0),
        "min_p": config.min_p or 0.0,
    }
