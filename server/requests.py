"""A completion request as requests to the engine: one per prompt and sample."""

import secrets
from dataclasses import dataclass
from typing import Any

from engine import admission, logs
from engine.config import BOS_ID, BYTE_OFFSET, ModelLimits
from engine.types import DecoderName, Request, SamplingParams, UnmaskRule

from .errors import ApiError, from_failed
from .model_names import choose_decoder, default_model
from .options import OPTIONS, WrongOption, options_of
from .schemas import CompletionRequest
from .settings import ServerSettings


@dataclass(frozen=True)
class Plan:
    """`requests` are ordered by prompt, then sample; each prompt has `samples` of them."""

    request: CompletionRequest
    model: str
    """The name of the model, as the request gave it if it did."""
    requests: list[Request]
    samples: int

    @property
    def decoder(self) -> DecoderName:
        return self.requests[0].decoder


def make_plan(request: CompletionRequest, completion_id: str, settings: ServerSettings, limits: ModelLimits) -> Plan:
    """Checks what only the loaded model and the settings can tell. Raises ApiError."""
    model = request.model or default_model(settings, limits)
    decoder = choose_decoder(model, request.decoder, settings, limits)
    options = _decoder_options(request, decoder)
    samples = request.n if request.best_of is None else request.best_of
    _check_combinations(request, samples)
    texts = _split_prompt(request)
    if len(texts) * samples > settings.max_choices:
        message = (
            f"{len(texts)} prompts with {samples} samples each make {len(texts) * samples} sequences; "
            f"at most {settings.max_choices} are allowed"
        )
        raise ApiError(400, message, param="prompt" if len(texts) > settings.max_choices else "n")
    limit = settings.max_tokens_limit
    if limit is not None and request.max_tokens > limit:
        raise ApiError(400, f"max_tokens: must be at most {limit}, not {request.max_tokens}", param="max_tokens")
    prompts = [_to_ids(text, request, limits) for text in texts]
    ranked = samples > request.n
    requests: list[Request] = []
    bias = {int(token): value for token, value in request.logit_bias.items()}
    log_fields = dict(logs.context.get())
    for number, prompt_ids in enumerate(prompts):
        # With a seed of its own a prompt's samples do not depend on the prompts beside it; without one, equal prompts
        # must still differ.
        seed = secrets.randbits(64) if request.seed is None else request.seed % (1 << 64)
        sampling = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(request.top_k, 0),
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias,
            seed=seed,
        )
        requests += [
            Request(
                id=f"{completion_id}-{number * samples + sample}",
                prompt_ids=prompt_ids,
                max_tokens=request.max_tokens,
                sampling=sampling,
                sample_index=sample,
                stop=[stop.encode() for stop in request.stop],
                ignore_eos=request.ignore_eos,
                logprobs=0 if ranked and request.logprobs is None else request.logprobs,
                # All samples of a prompt have the same scores of it: one computes them.
                prompt_logprobs=request.echo and request.logprobs is not None and sample == 0,
                priority=request.priority,
                timeout=request.timeout or settings.default_timeout,
                trace=request.trace,
                patches_from=0 if request.patches else None,
                decoder=decoder,
                log_fields=log_fields,
                **options,
            )
            for sample in range(samples)
        ]
    # The samples of a prompt differ in nothing that may be refused.
    for first in requests[::samples]:
        if refusal := admission.check(first, limits):
            raise from_failed(refusal)
    _bound_scores(request, prompts, samples, settings.max_scores)
    _bound_lists(request, prompts, samples, settings.max_scores)
    return Plan(request, model, requests, samples)


def _check_combinations(request: CompletionRequest, samples: int) -> None:
    if samples < request.n:
        raise ApiError(400, f"best_of: must be at least n ({request.n}), not {samples}", param="best_of")
    if request.stream and samples > request.n:
        raise ApiError(400, "best_of: a stream cannot be ranked; best_of must equal n", param="best_of")
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options: only allowed when stream is true", param="stream_options")


def _decoder_options(request: CompletionRequest, decoder: DecoderName) -> dict[str, Any]:
    """The options that were given, as fields of an engine request."""
    given = {option: getattr(request, option) for option in OPTIONS}
    if request.unmask:
        given["unmask"] = UnmaskRule(**request.unmask.model_dump(exclude_none=True))
    try:
        return options_of(decoder, given)
    except WrongOption as error:
        raise ApiError(400, str(error), param=error.option) from None


def _split_prompt(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _bound_scores(request: CompletionRequest, prompts: list[list[int]], samples: int, most: int) -> None:
    """Log-probabilities are many times larger than the text that they are of."""
    if request.logprobs is None:
        return
    scored = sum(map(len, prompts)) if request.echo else 0
    # Those of a stream are sent as they come.
    generated = 0 if request.stream else request.max_tokens * len(prompts)
    scores = (scored + generated) * samples * (request.logprobs + 1)
    if scores > most:
        what = " and ".join(["prompt"] * bool(scored) + ["max_tokens"] * bool(generated))
        message = (
            f"logprobs: {what} ({scored + generated} bytes) times {samples} samples times {request.logprobs + 1} make "
            f"{scores} log-probabilities; at most {most} are allowed"
        )
        raise ApiError(400, message, param="logprobs", code="too_many_scores")


def _bound_lists(request: CompletionRequest, prompts: list[list[int]], samples: int, most: int) -> None:
    """A prompt's entropies and ids come with each of its samples, and in a stream at once."""
    if not (request.patches or request.return_token_ids):
        return
    field, entries = ("patches", "entropies") if request.patches else ("return_token_ids", "ids")
    generated = 0 if request.stream else request.max_tokens * len(prompts)
    length = sum(map(len, prompts)) + generated
    if length * samples > most:
        message = (
            f"{field}: prompt{' and max_tokens' if generated else ''} ({length} bytes) times {samples} samples make "
            f"{length * samples} {entries}; at most {most} are allowed"
        )
        raise ApiError(400, message, param=field, code="too_many_scores")


def _to_ids(prompt: str | list[int], request: CompletionRequest, limits: ModelLimits) -> list[int]:
    """A string becomes BOS, if that is wanted, and its bytes; names of special ids in it are just text. Ids are taken
    as they are. A text that is too long becomes no ids."""
    if isinstance(prompt, list):
        return prompt
    first, data = [BOS_ID] if request.add_special_tokens else [], prompt.encode()
    if (length := len(first) + len(data)) > limits.max_length:
        raise from_failed(admission.prompt_too_long(length, limits.max_length))
    return [*first, *(byte + BYTE_OFFSET for byte in data)]
