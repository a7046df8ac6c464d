"""What a compression is asked to do. Imports no torch, so that a server knows it before it imports what does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from softbatch.prompt_store.compression.data.examples import MAX_EXAMPLES
from softbatch.prompt_store.manifest import MAX_VIRTUAL_TOKENS
from softbatch.prompt_store.stores.kept_text import MAX_RECALL

Kind = Literal["embeddings", "kv"]
Objective = Literal["kl", "nll", "mixed"]
# With half of the questions for facts, and passages beside a quarter of the pairs, kl_closed fell a little on the
# default model, and right answers stayed what they were: both are there to be asked for.
FACTS = 0.0
# The manifest of a soft prompt keeps the instruction; longer texts do not fit there.
MAX_INSTRUCTION_CHARS = 4096
MAX_MINUTES = 30 * 24 * 60
# The smallest and the largest value of a setting, wherever it is asked for.
BOUNDS: dict[str, tuple[float, float]] = {
    "virtual_tokens": (2, MAX_VIRTUAL_TOKENS),
    "steps": (1, 1_000_000),
    "questions": (0, MAX_EXAMPLES),
    "model_questions": (0, 10_000),
    "held_out": (4, 10_000),
    "free_answers": (0, 1_000),
    "max_answer_tokens": (4, 4_096),
    "batch_size": (1, 1_024),
    "learning_rate": (1e-8, 10),
    "matching_steps": (0, 100_000),
    "seed": (0, 2**63 - 1),
    "facts": (0, 1),
    "recall": (0, MAX_RECALL),
}


@dataclass(frozen=True)
class MatchingSettings:
    """`steps` of Adam over the observed batches in turn, cut short after `seconds`."""

    steps: int = 500
    seconds: float | None = None
    key_rate: float = 0.1
    value_rate: float = 0.02
    embedding_rate: float = 0.03


def weight_of_nll(objective: str, alpha: float) -> float:
    """The α that makes `mixed` the objective. Raises ValueError for an unknown objective or α outside [0,
    1]."""
    if objective not in get_args(Objective):
        raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}, got {objective!r}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    return {"nll": 1.0, "kl": 0.0}.get(objective, alpha)


@dataclass(frozen=True)
class CompressionSettings:
    """Raises ValueError naming the field at fault.

    Exactly one of `minutes` (a budget for everything, evaluation included) and `steps` (of training; then the
    whole run is a function of the seed) applies: `steps` where it is given. `questions` bounds the training
    questions beside the user's own; under a budget fewer are used where time is short. `model_questions` of
    them are asked of the model itself. `held_out` questions are kept for the report, `free_answers` of those
    are also answered freely. `learning_rate` None: the kind's default. `facts` is the share of training questions
    that ask for something that the text says exactly, as long as there are any. With `recall` passages σ is trained to
    have them behind it.
    """

    kind: Kind = "kv"
    virtual_tokens: int = 64
    objective: str = "kl"
    alpha: float = 0.5
    minutes: float | None = 10.0
    steps: int | None = None
    questions: int = 2000
    model_questions: int = 0
    held_out: int = 32
    free_answers: int = 16
    max_answer_tokens: int = 48
    instruction: str | None = None
    batch_size: int = 4
    learning_rate: float | None = None
    matching_steps: int = MatchingSettings.steps
    seed: int = 0
    facts: float = FACTS
    recall: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("kv", "embeddings"):
            raise ValueError(f"kind must be kv or embeddings, got {self.kind!r}")
        weight_of_nll(self.objective, self.alpha)
        if self.steps is None and self.minutes is None:
            raise ValueError("give minutes or steps")
        if self.minutes is not None and not 0 < self.minutes <= MAX_MINUTES:
            raise ValueError(f"minutes must lie between 0 and {MAX_MINUTES}, got {self.minutes}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not low <= value <= high):
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
        if self.instruction is not None and len(self.instruction) > MAX_INSTRUCTION_CHARS:
            raise ValueError(f"instruction is longer than {MAX_INSTRUCTION_CHARS} characters")

    @property
    def seconds(self) -> float | None:
        """The budget for the whole run, None when steps bound it."""
        return None if self.steps is not None or self.minutes is None else self.minutes * 60.0
