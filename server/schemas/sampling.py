"""The fields that say how tokens are chosen and when a text ends, shared by the generating routes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from softbatch.prompt_store.stores.kept_text import MAX_RECALL
from softbatch.scheduler.protocol import MAX_PRIORITY, SamplingParams
from softbatch.server.request_failures import printable
from softbatch.server.schemas.base import MAX_INT32, MAX_NAME_CHARS, Neutral, RequestModel, Text, refusal
from softbatch.server.schemas.structured import StructuredRequest

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_ALLOWED_TOKENS = 1 << 16
MAX_BAD_WORDS = 128
MAX_CHOICES_PER_PROMPT = 16
MAX_TIMEOUT_MS = 86_400_000
SEED_MASK = 2**63 - 1

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARS)]
# What `model` names; empty where a client has no name to give.
BaseOrSoftPrompt = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]
Recall = Annotated[
    int | None,
    Field(
        default=None,
        ge=0,
        le=MAX_RECALL,
        description="so many passages of the soft prompt's kept text are put before the question; left out: as its "
        "registration says; not from OpenAI's API",
    ),
]
ReturnRecalled = Annotated[bool, Field(default=False, description="show the recalled passages in the reply")]
TokenCount = Annotated[int, Field(ge=1, le=MAX_INT32)]
Milliseconds = Annotated[int, Field(ge=1, le=MAX_TIMEOUT_MS)]
Salt = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARS)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


def _as_stop_list(value: object) -> object:
    """Forms with a field that was left empty send an empty string."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and len(value) > MAX_STOP_STRINGS:
        raise refusal("too_long", f"at most {MAX_STOP_STRINGS} stop strings are allowed, not {len(value)}")
    return [one for one in value if one not in ("", None)] if isinstance(value, list) else value


def _as_biases(value: object) -> object:
    """OpenAI's keys are token ids as text. Some languages write an object without keys as an empty list."""
    if value == []:
        return {}
    if not isinstance(value, dict):
        raise refusal("logit_bias", "must be an object with token ids as its keys and numbers as its values")
    if len(value) > MAX_BIASES:
        raise refusal("too_long", f"at most {MAX_BIASES} tokens are allowed, not {len(value)}")
    biases: dict[int, object] = {}
    for key, bias in value.items():
        is_id = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= MAX_INT32
        if not is_id:
            name = printable(str(key))[:MAX_NAME_CHARS]
            raise refusal("token_id", f"a key is a token id, an integer from 0 to {MAX_INT32} as text", name)
        biases[int(key)] = bias
    return biases


StopStrings = Annotated[list[StopString], BeforeValidator(_as_stop_list, json_schema_input_type=str | list[StopString])]


def at_most_items(limit: int) -> BeforeValidator:
    """Refuse a long list before any of its items is looked at."""

    def check(value: object) -> object:
        if isinstance(value, list) and len(value) > limit:
            raise refusal("too_long", f"at most {limit} items are allowed, not {len(value)}")
        return value

    return BeforeValidator(check)


# What other servers' samplers know, with the values that switch it off.
OTHER_SAMPLERS: Neutral = {
    "typical_p": (1.0,),
    "typical": (1.0,),
    "top_a": (0.0,),
    "tfs_z": (1.0,),
    "tfs": (1.0,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "xtc_probability": (0.0,),
    "dry_multiplier": (0.0,),
    "dynatemp_range": (0.0,),
    "smoothing_factor": (0.0,),
    "repeat_penalty": (1.0,),
    "typ_p": (1.0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "n_keep": (0,),
    "n_probs": (0,),
    "repetition_penalty_range": (0,),
    "rep_pen_range": (0,),
    "min_keep": (0,),
    "min_length": (0,),
    "nsigma": (0.0,),
    "top_n_sigma": (0.0, -1.0),
    "skew": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "max_tokens_second": (0,),
    "prompt_lookup_num_tokens": (0,),
    "add_bos_token": (True,),
}

# Numbers of those samplers, which mean nothing while they are off.
SAMPLER_SETTINGS = frozenset(
    {
        "mirostat_tau",
        "mirostat_eta",
        "xtc_threshold",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "smoothing_curve",
        "repeat_last_n",
        "dynatemp_low",
        "dynatemp_high",
    }
)

TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
    BeforeValidator(_as_biases, json_schema_input_type=dict[str, float]),
]


class StreamOptions(RequestModel):
    """What a stream carries besides its text."""

    # Asks for padding that hides how long the texts are, or for none.
    without_effect: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = Field(default=False, description="end with a chunk with the usage")
    continuous_usage_stats: bool = Field(
        default=False, description="the usage so far of its choice in every chunk; not from OpenAI's API"
    )


class QueuedRequest(RequestModel):
    """The fields of every request that the engine computes, apart from what is computed and how."""

    model: BaseOrSoftPrompt | None = Field(
        default=None,
        description="the base model (also when left out, or a placeholder such as 'tgi'), or the name of a soft prompt",
    )
    soft_prompt: ModelName | None = Field(default=None, description="prepended; only this server's")
    priority: int = Field(
        default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="lower goes first; only this server's"
    )
    cache_salt: Salt = Field(
        default="", description="only requests with the same salt share cached prefixes; only this server's"
    )
    timeout_ms: Milliseconds | None = Field(
        default=None,
        description="milliseconds from arrival: without output by then the request gets 504, otherwise it ends with "
        "what it has; left out: the server's --request-timeout; only this server's",
    )

    @property
    def timeout(self) -> float | None:
        """In seconds."""
        return None if self.timeout_ms is None else self.timeout_ms / 1000


class OpenAIRequest(StructuredRequest, QueuedRequest):
    """The fields that `/v1/completions` and `/v1/chat/completions` share."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "parallel_tool_calls",
            # How another server would do it, or call it; the answer is the same.
            "request_id",
            "guided_decoding_backend",
            "cache_prompt",
            "keep_alive",
            "ttl",
            "id_slot",
            "slot_id",
            "timings_per_token",
            "return_progress",
            # A guess of the answer, which makes it come sooner elsewhere.
            "prediction",
        }
    ).union(SAMPLER_SETTINGS)

    recall: Recall = None
    return_recalled: ReturnRecalled = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES_PER_PROMPT, description="choices per prompt")
    seed: Seed | None = Field(default=None, description="choice i of a prompt draws from seed + i")
    stop: StopStrings = Field(default=[], description="the text ends before the first of these strings")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 always takes the most likely token")
    top_p: float = Field(default=1.0, ge=0, le=1, description="0 always takes the most likely token")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    top_k: int = Field(default=0, ge=-1, le=MAX_INT32, description="0 or -1: off; not from OpenAI's API")
    min_p: float = Field(default=0.0, ge=0, le=1, description="not from OpenAI's API")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, description="not from OpenAI's API")
    stop_token_ids: Annotated[list[TokenId], at_most_items(MAX_STOP_TOKEN_IDS)] = Field(
        default=[], description="the text ends with any of these tokens; not from OpenAI's API"
    )
    ignore_eos: bool = Field(default=False, description="go on after end-of-text; not from OpenAI's API")
    min_tokens: int = Field(
        default=0,
        ge=0,
        le=MAX_INT32,
        description="the text does not end before it has so many tokens; not from OpenAI's API",
    )
    logit_bias: Biases = Field(
        default={},
        description="what is added to the logits of these tokens, -100 to 100, before penalties and temperature; "
        "log-probabilities are told without it",
    )
    allowed_token_ids: Annotated[list[TokenId], at_most_items(MAX_ALLOWED_TOKENS)] | None = Field(
        default=None, min_length=1, description="no other tokens are chosen; not from OpenAI's API"
    )
    bad_words: Annotated[list[StopString], at_most_items(MAX_BAD_WORDS)] = Field(
        default=[],
        description="the tokens of these words, with and without a space in front, are not chosen one behind the "
        "other; not from OpenAI's API",
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="the text keeps what has ended it; not from OpenAI's API"
    )
    skip_special_tokens: bool = Field(
        default=True, description="false: special tokens are part of the text; not from OpenAI's API"
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_INT32,
        description="only the last so many tokens of the prompt count, with those that the tokenizer puts in front of "
        "every text; -1: as many as there is room for; not from OpenAI's API",
    )
    return_token_ids: bool = Field(
        default=False, description="also tell the ids of the prompt's and the output's tokens; not from OpenAI's API"
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="log-probabilities name tokens 'token_id:…'; not from OpenAI's API"
    )
    user: Text = Field(
        default="",
        description="who asks, if API keys do not tell: users have equal shares of the server, as keys have",
    )

    def seed_of(self, choice: int) -> int | None:
        """The seed of one prompt's `choice`, in the 63 bits that the sampler takes."""
        return None if self.seed is None else (self.seed + choice) & SEED_MASK

    def sampling_params(self, logprobs: int | None) -> SamplingParams:
        """`max_tokens` and `seed` are the generator's to set."""
        return SamplingParams(
            temperature=self.temperature if self.top_p > 0 else 0.0,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=logprobs,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logit_bias=self.logit_bias,
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
        )

    @model_validator(mode="after")
    def _is_possible(self) -> OpenAIRequest:
        if self.truncate_prompt_tokens == 0:
            raise refusal("truncate", "must be at least 1, or -1", "truncate_prompt_tokens")
        if self.allowed_token_ids is not None and (wanted := self.output_format) is not None:
            message = f"not together with {wanted.param}, which says what is allowed"
            raise refusal("output_format", message, "allowed_token_ids")
        return self

    def check_stream_options(self) -> None:
        options = self.stream_options
        if options is not None and not self.stream and (options.include_usage or options.continuous_usage_stats):
            raise refusal("stream_options", "only allowed with 'stream': true", "stream_options")

    def check_lengths(self, max_tokens: int | None, name: str) -> None:
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise refusal("min_tokens", f"must not be more than {name} ({max_tokens})", "min_tokens")


# Asked for by OpenAI's or vLLM's clients, done by neither route yet.
UNSUPPORTED: Neutral = {
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    # No tokenizer that is read here puts any.
    "spaces_between_special_tokens": (True, False),
    "truncation_side": ("left",),
    "prompt_logprobs": (),
    "logits_processors": ([],),
    "detokenize": (True,),
    "do_sample": (True,),
    **OTHER_SAMPLERS,
}

FinishReason = Literal["stop", "length"]
STOP_REASON = "the stop string or stop token id that ended the text; 'timeout' if its time was over"
