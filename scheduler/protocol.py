"""What crosses the process boundary between the front end and the engine: msgspec structs, never pickle.

The front end sends `EngineInput`s, the engine answers with `EngineOutput`s, both as msgpack over ZeroMQ.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from softbatch.prompt_store.manifest import ModelSpec

# The front end alone says "timeout": the engine knows no deadlines.
FinishReason = Literal["eos", "stop", "length", "timeout", "error", "cancelled"]


# A request's own priority, which goes first the lower it is, lies between this number and its negative.
MAX_PRIORITY = 1000
# Added to the priority of what is asked in the background, so that it goes behind everything else.
BACKGROUND = 2 * MAX_PRIORITY + 1


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the next token of one sequence is chosen, and when the sequence ends.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. `logprobs` is the number of top
    alternatives reported per token (0: the chosen token's alone; None: no log-probabilities). None of `ending_ids` is
    chosen before there are `min_tokens`. `logit_bias` is added to the logits of its tokens. With `allowed_token_ids`
    no other token is chosen, and never one that completes one of the `bad_words`, which are tokens too.

    `grammar` is what the output must follow, in llguidance's form; empty: anything. It excludes `allowed_token_ids`. An
    output with a grammar ends with an end token even if `ignore_eos` is set, and when the grammar leaves nothing else
    to say. `begun` is what the prompt's end has already written of what the grammar is about.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    ending_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    begun: str = ""


class SoftPromptRef(msgspec.Struct, frozen=True):
    """A soft prompt as the engine knows it. The content hash is its identity; `path` is the leased file.

    Embeddings that stand in front of sequences of `turned_for` tokens, where a model turns positions by that, have
    other keys: they are a soft prompt of their own, whose `sha256` has that behind it.
    """

    sha256: str
    path: str
    num_virtual_tokens: int
    turned_for: int = 0
    has_keys: bool = False  # its file does, as they are

    def turned(self, length: int) -> SoftPromptRef:
        """As it stands in front of sequences of so many tokens."""
        if self.has_keys:
            return self
        return SoftPromptRef(f"{self.sha256}:{length}", self.path, self.num_virtual_tokens, length)

    @property
    def content(self) -> str:
        """The hash of the file's content."""
        return self.sha256.partition(":")[0]


Pooling = Literal["mean", "last"]


class AddRequest(msgspec.Struct, frozen=True, tag="add", omit_defaults=True, kw_only=True):
    """Start a sequence. `token_ids` holds the prompt and, for a resumed request, the `num_delivered` output
    tokens at its end that an engine which has died had generated.

    `score_from` set: the log-probability of each prompt token from that index on, given all before it, is reported
    with `score_top` alternatives. The report comes with the first output token, or is the end if `max_tokens` is 0. A
    request for no output always sets it, to the number of its tokens if none is to be scored.

    `pooling` set, with `max_tokens` 0: the model's last hidden states at the prompt's tokens are reported as one
    vector, their mean or the last of them. Virtual tokens are seen by the others, but are not part of it.

    Among requests of one priority, each `owner` has a share of the tokens by its `weight`; it is a word that stands
    for somebody, never a key or a name. The `Moment`s of a `traced` one are reported.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    num_delivered: int = 0
    soft_prompt: SoftPromptRef | None = None
    priority: int = 0
    owner: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    score_from: int | None = None
    score_top: int = 0
    pooling: Pooling | None = None
    traced: bool = False


class CancelRequest(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop these sequences before the next step. Unknown ones are ignored."""

    request_ids: list[str]


class ForgetSoftPrompt(msgspec.Struct, frozen=True, tag="forget"):
    """The soft prompt was deleted from the store: evict it as soon as no sequence uses it."""

    sha256: str


EngineInput = AddRequest | CancelRequest | ForgetSoftPrompt


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token and of the top alternatives, best first, before any sampling filter."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(TokenLogprobs, frozen=True, array_like=True):
    """The same of a given token. `rank` is its place in the whole vocabulary: 1 for the most probable one."""

    rank: int


class SequenceOutput(msgspec.Struct, array_like=True):
    """What one step computed for one sequence. `num_computed` includes virtual tokens; `num_cached` counts the
    prompt tokens that the prefix cache had when the sequence was first admitted; `embedding` is what `pooling` has
    made of the prompt."""

    request_id: str
    num_computed: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    scores: list[PromptLogprobs] | None = None
    num_cached: int = 0
    embedding: list[float] | None = None


MomentKind = Literal["loaded", "admitted", "preempted", "first_token", "ended"]


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """When something happened to a traced sequence, in monotonic seconds; of a load of its soft prompt, `at` is the end
    and `since` the begin."""

    request_id: str
    kind: MomentKind
    at: float
    since: float | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The state after a step. Fields named `*_total` count since the engine started; the others are levels."""

    waiting: int
    running: int
    waiting_tokens: int
    kv_blocks_used: int
    preemptions_total: int
    out_of_memory_total: int
    prefix_cache_queries_total: int
    prefix_cache_hits_total: int
    soft_prompts_resident: int
    soft_prompt_resident_bytes: int
    soft_prompt_hits_total: int
    soft_prompt_misses_total: int
    soft_prompt_evictions_total: int


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process is started with. `inbox` and `outbox` are ZeroMQ addresses.

    `started_at` is when the front end started the process, in monotonic seconds. `kv_cache_gib` None: on a GPU the KV
    cache takes what `gpu_memory_utilization` leaves, on a CPU a fixed size. `step_target`, in seconds, None: short on a
    CPU, none on a GPU."""

    model: str
    served_model_name: str | None = None
    chat_template: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    max_batch_size: int = 32
    max_batch_tokens: int = 1024
    step_target: float | None = None
    max_model_len: int | None = None
    max_queue_size: int = 256
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    async_scheduling: str = "auto"
    deterministic: bool = False
    max_prompt_bytes: int = 256 << 20
    inbox: str = ""
    outbox: str = ""
    started_at: float | None = None


class StepOutput(msgspec.Struct, tag="step", kw_only=True):
    """One message per step. `admitted` and `preempted` name sequences that changed queue in this step;
    `batch_size` is 0 for a heartbeat sent while idle. Times are monotonic seconds. `resident` has the content hashes of
    the soft prompts in KV blocks, whenever these have changed."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    admitted: list[str] = []
    preempted: list[str] = []
    batch_size: int = 0
    num_tokens: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    soft_prompt_load_seconds: list[float] = []
    resident: list[str] | None = None
    moments: list[Moment] = []

    @property
    def has_news(self) -> bool:
        """Whether anything but the statistics can differ from before."""
        changes = self.outputs or self.admitted or self.preempted or self.soft_prompt_load_seconds
        return bool(self.batch_size or self.num_tokens or changes or self.resident is not None)


class Admitting(msgspec.Struct, frozen=True, tag="admitting"):
    """The next step computes for these sequences for the first time. It is said before: should the step be the end of
    the process, the front end knows who was in it."""

    request_ids: list[str]


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent every second by a thread of its own, during a step too, which has been running for `step_seconds`."""

    step_seconds: float


class StartupPhase(msgspec.Struct, frozen=True, tag="phase"):
    """Progress of the start: `seconds` is how long the named phase took."""

    name: str
    seconds: float
    detail: str = ""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end needs to know of the loaded model; soft prompts are checked against it."""

    name: str
    tokenizer_path: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    attention: str
    num_parameters: int

    @property
    def is_on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def spec(self) -> ModelSpec:
        """What a soft prompt must fit to be used with this model."""
        return ModelSpec(
            name=self.name,
            fingerprint=self.fingerprint,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The engine takes requests from now on."""

    model: ModelInfo
    num_blocks: int
    block_size: int
    kv_bytes: int


class StartupFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start; `message` is one line that says what to change."""

    message: str


EngineOutput = StepOutput | Admitting | Heartbeat | StartupPhase | Ready | StartupFailed
