"""How far each format of weights and KV cache is from the float32 model: KL per token and top-1 agreement, on two
example texts, and on the float32 model's answers to the example questions behind the shipped soft prompt.

python -m benchmarks.parts.precision
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softbatch.prompt_store.compression.frozen.rendering import Renderer
from softbatch.prompt_store.soft_prompt_file import load
from softbatch.scheduler.model.batch import Row, build_batch
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.cpu.formats import KvFormat, WeightFormat
from softbatch.scheduler.model.kv_cache import KVCache
from softbatch.scheduler.model.llama.decoder import DecoderForward, supports
from softbatch.scheduler.model.loader import load_transformers
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENS, CHUNK, BLOCK, ANSWER = 1024, 256, 16, 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Asked:
    """A question's tokens and the answer's."""

    question: list[int]
    answer: list[int]


class Decoder:
    """The decoder in C++ over a cache of its own, with the shipped soft prompt in the cache's first blocks."""

    def __init__(self, dtype: torch.dtype, weights: WeightFormat, kv_format: KvFormat = KvFormat.PLAIN) -> None:
        model, self.tokenizer = load_transformers(resolve(EMBEDDED_ALIAS), dtype, CPU)
        if not (supports(model, dtype) and build_kernels()):
            raise SystemExit("the kernels cannot be built here; see the warning above")
        prompt = load(EXAMPLES / "manual" / "manual.safetensors", 1 << 30)
        self.virtual = prompt.manifest.num_virtual_tokens
        self._prompt_blocks = list(range(-(-self.virtual // BLOCK)))
        self._free = list(range(len(self._prompt_blocks), len(self._prompt_blocks) + TOKENS // BLOCK))
        cache = KVCache(
            num_layers=model.config.num_hidden_layers,
            num_blocks=self._free[-1] + 1,
            num_kv_heads=model.config.num_key_value_heads,
            block_size=BLOCK,
            head_dim=model.model.layers[0].self_attn.head_dim,
            dtype=dtype,
            device=CPU,
            kv_format=kv_format,
        )
        cache.write(self._prompt_blocks, cache.stage(prompt.tensors["keys"], prompt.tensors["values"]))
        self._forward = DecoderForward(model, cache, weights)

    def text(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities at every token: [TOKENS, vocab]."""
        starts = range(0, TOKENS, CHUNK)
        return torch.cat([self._run(Row(s, tokens[s : s + CHUNK], self._free, range(CHUNK))) for s in starts])

    def asked(self, question: list[int]) -> Asked:
        """Greedily answered."""
        answer: list[int] = []
        start, tokens = self.virtual, question
        while len(answer) < ANSWER and (not answer or answer[-1] != self.tokenizer.eos_token_id):
            answer.append(int(self._run(self._behind(start, tokens, range(len(tokens) - 1, len(tokens)))).argmax()))
            start, tokens = start + len(tokens), answer[-1:]
        return Asked(question, answer)

    def answers(self, asked: Sequence[Asked]) -> torch.Tensor:
        """Log-probabilities at every token of the answers: [answers' tokens, vocab]."""
        found = []
        for one in asked:
            tokens = [*one.question, *one.answer[:-1]]
            found.append(self._run(self._behind(self.virtual, tokens, range(len(one.question) - 1, len(tokens)))))
        return torch.cat(found)

    def _behind(self, start: int, tokens: list[int], wanted: range) -> Row:
        return Row(start, tokens, [*self._prompt_blocks, *self._free], wanted)

    def _run(self, row: Row) -> torch.Tensor:
        return self._forward(build_batch([row], BLOCK, CPU)).log_softmax(-1)


def through_transformers(dtype: torch.dtype, tokens: Sequence[int]) -> torch.Tensor:
    model: Any = load_transformers(resolve(EMBEDDED_ALIAS), dtype, CPU)[0]
    model.set_attn_implementation("eager")
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)


def compared(exact: torch.Tensor, own: torch.Tensor) -> str:
    kl = (exact.exp() * (exact - own)).sum(-1)
    agreed = (own.argmax(-1) == exact.argmax(-1)).float().mean()
    return f"{kl.mean():.5f} | {kl.quantile(0.95):.5f} | {agreed:.4f}"


@torch.inference_mode()
def main() -> None:
    exact = Decoder(torch.float32, WeightFormat.FLOAT32)
    whole = "".join((EXAMPLES / name / "context.md").read_text() for name in ("manual", "policy"))
    tokens = exact.tokenizer(whole)["input_ids"][:TOKENS]
    renderer = Renderer(exact.tokenizer)
    lines = (EXAMPLES / "manual" / "questions.jsonl").read_text().splitlines()
    asked = [exact.asked(renderer.question(json.loads(line)["input"])) for line in lines]
    text, answers = through_transformers(torch.float32, tokens), exact.answers(asked)
    print("| | texts: KL, mean | 95th percentile | top-1 | behind a soft prompt: KL, mean | 95th percentile | top-1 |")
    print("|---|---|---|---|---|---|---|")
    theirs = compared(text, through_transformers(torch.bfloat16, tokens))
    print(f"| transformers, bfloat16 | {theirs} | | | |", flush=True)
    for name, dtype, weights, kv_format in (
        ("float32", torch.float32, WeightFormat.FLOAT32, KvFormat.PLAIN),
        ("bfloat16", torch.bfloat16, WeightFormat.BFLOAT16, KvFormat.PLAIN),
        ("bfloat16, KV cache int8", torch.bfloat16, WeightFormat.BFLOAT16, KvFormat.INT8),
        ("bfloat16, KV cache k6v4", torch.bfloat16, WeightFormat.BFLOAT16, KvFormat.K6V4),
        ("int8", torch.bfloat16, WeightFormat.INT8, KvFormat.PLAIN),
        ("int8, KV cache int8", torch.bfloat16, WeightFormat.INT8, KvFormat.INT8),
    ):
        own = Decoder(dtype, weights, kv_format)
        print(f"| {name} | {compared(text, own.text(tokens))} | {compared(answers, own.answers(asked))} |", flush=True)


if __name__ == "__main__":
    main()
