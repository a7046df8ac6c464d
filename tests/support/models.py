"""Models that several tests use, transformers to compare with, and soft prompts that fit them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen3Config

from softbatch.prompt_store.fingerprint import fingerprint
from softbatch.prompt_store.manifest import Manifest, ModelRef
from softbatch.prompt_store.soft_prompt_file import SoftPrompt
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.scheduler.protocol import ModelInfo

FEW_TOKENS = 4096

if not torch.cuda.is_available():
    torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine
TINY_VOCAB = 49152  # the embedded model's, so that its tokenizer serves them too


@contextmanager
def in_threads(count: int) -> Iterator[None]:
    """torch and the kernels compute with so many threads, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Reference:
    """A model directory and plain transformers in float32, to compare with."""

    path: str
    model: Any
    tokenizer: Any
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _caches: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    def generate(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        prompt: SoftPrompt | None = None,
        guess: Sequence[int] = (),
        shared: int = 0,
    ) -> list[int]:
        """Greedy output tokens of transformers, eos included. Computed once for each question.

        A whole answer that is guessed, such as the engine's, is looked at in one forward: where each of its tokens is
        by far the most probable it is the answer. Any other guess changes nothing but the time: `generate` decides.
        What other questions `shared` with this one, so many of its first tokens, that forward has from transformers'
        own cache.
        """
        digest = hashlib.sha256(repr((list(token_ids), max_tokens)).encode())
        for name, tensor in sorted(prompt.tensors.items()) if prompt is not None else ():
            digest.update(name.encode() + tensor.float().numpy().tobytes())
        key = digest.hexdigest()
        if key not in self._known:
            is_right = self._is_greedy(token_ids, max_tokens, prompt, guess, shared)
            self._known[key] = list(guess) if is_right else self._generate(token_ids, max_tokens, prompt)
        return list(self._known[key])

    @torch.inference_mode()
    def _is_greedy(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        prompt: SoftPrompt | None,
        guess: Sequence[int],
        shared: int = 0,
    ) -> bool:
        """Whether `guess` is whole and leads the next token at each of its places by more than sums may be off."""
        stops = self.model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        is_whole = len(guess) == max_tokens or (0 < len(guess) < max_tokens and guess[-1] in stops)
        if not is_whole or stops & set(guess[:-1]):
            return False
        if (getattr(self.model.config, "rope_parameters", None) or {}).get("rope_type") in ("longrope", "dynamic"):
            return False  # one forward turns all positions alike, and many do not
        ids = torch.tensor([[*token_ids, *guess[:-1]]])
        if prompt is None and shared:
            cache = self._cache_behind(tuple(token_ids[:shared]))
            output = self.model(ids[:, shared:], past_key_values=cache, logits_to_keep=len(guess))
        elif prompt is None:
            output = self.model(ids, use_cache=False, logits_to_keep=len(guess))
        elif prompt.manifest.kind == "embeddings":
            own = self.model.get_input_embeddings()(ids)
            inputs = torch.cat([prompt.embeddings[None], own], dim=1)
            output = self.model(inputs_embeds=inputs, use_cache=False, logits_to_keep=len(guess))
        else:
            output = self.model(ids, past_key_values=self._cache_of(prompt), logits_to_keep=len(guess))
        best = output.logits[0, -len(guess) :].topk(2)
        leads = best.values[:, 0] - best.values[:, 1] > 1e-3
        return best.indices[:, 0].tolist() == list(guess) and bool(leads.all())

    def _cache_behind(self, token_ids: tuple[int, ...]) -> Any:
        """One to go on from, of tokens that are computed once."""
        if token_ids not in self._caches:
            self._caches[token_ids] = self.model(torch.tensor([token_ids]), logits_to_keep=1).past_key_values
        return copy.deepcopy(self._caches[token_ids])

    def _cache_of(self, prompt: SoftPrompt) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer in range(prompt.keys.shape[0]):
            cache.update(prompt.keys[layer][None].transpose(1, 2), prompt.values[layer][None].transpose(1, 2), layer)
        return cache

    @torch.inference_mode()
    def _generate(self, token_ids: Sequence[int], max_tokens: int, prompt: SoftPrompt | None) -> list[int]:
        options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
        ids = torch.tensor([list(token_ids)])
        if prompt is None:
            output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            return output[0, ids.shape[1] :].tolist()
        if prompt.manifest.kind == "embeddings":
            embeddings = torch.cat([prompt.embeddings[None], self.model.get_input_embeddings()(ids)], dim=1)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
            output = self.model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
            return output[0].tolist()
        cache = self._cache_of(prompt)
        virtual = prompt.manifest.num_virtual_tokens
        # generate() takes the ids of the cached positions too; what they are does not matter.
        whole = torch.cat([torch.zeros(1, virtual, dtype=torch.long), ids], dim=1)
        output = self.model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **options)
        return output[0, whole.shape[1] :].tolist()


def load_reference(path: str) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return Reference(path, model, AutoTokenizer.from_pretrained(path))


def tiny_config(name: str, **changes: Any) -> Any:
    """One of the tiny models' configs with changes."""
    known = TINY_CONFIGS[name]
    return type(known).from_dict(known.to_dict() | changes)


def save_tiny(config: Any, tokenizer: Any, path: Path) -> str:
    """A random model whose outputs vary: the weights are spread wider than at initialisation."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_tiny_compressible(path: Path) -> str:
    """A tiny model to compress contexts with: a window that holds one, and a vocabulary that costs little to compare.

    Most of a compression's time goes into distributions over the whole vocabulary.
    """
    config = tiny_config("llama", vocab_size=FEW_TOKENS, max_position_embeddings=2048)
    save_tiny(config, AutoTokenizer.from_pretrained(resolve(EMBEDDED_ALIAS).path), path)
    keep_first_tokens(path, FEW_TOKENS)
    return str(path)


def keep_first_tokens(directory: Path, count: int) -> None:
    """Cut the byte-level BPE tokenizer that lies there to its first tokens: rare words become several of them."""
    path = directory / "tokenizer.json"
    path.write_text(first_tokens(path.read_text(encoding="utf-8"), count), encoding="utf-8")


@cache
def first_tokens(tokenizer_json: str, count: int) -> str:
    tokenizer = json.loads(tokenizer_json)
    known = {token: number for token, number in tokenizer["model"]["vocab"].items() if number < count}
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["vocab"] = known
    tokenizer["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= known.keys()]
    return json.dumps(tokenizer)


TINY_CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3": Qwen3Config(
        vocab_size=TINY_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": GPT2Config(
        vocab_size=TINY_VOCAB,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def make_soft_prompt(
    kind: str, length: int, info: ModelInfo, *, seed: int = 0, scale: float = 0.3, **manifest: Any
) -> SoftPrompt:
    """A random soft prompt that fits the model; `scale` sets how far it moves the output."""
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    described = Manifest(
        kind=kind,
        num_virtual_tokens=length,
        model=ModelRef(name=info.name, fingerprint=info.fingerprint),
        source="test",
        created_at=1_700_000_000,
        **({"replaces": "nothing"} | manifest),
    )
    if kind == "embeddings":
        return SoftPrompt(described, embeddings=torch.randn(length, info.hidden_size, generator=generator) * scale)
    shape = (info.num_layers, length, info.num_kv_heads, info.head_dim)
    keys, values = (torch.randn(shape, generator=generator) * scale for _ in range(2))
    return SoftPrompt(described, keys=keys, values=values)


def reference_fingerprint(reference: Reference) -> str:
    return fingerprint(reference.model, reference.tokenizer)


def sample_texts(count: int) -> list[str]:
    """Distinct prompts of mixed length."""
    topics = [
        "the sea",
        "a bridge",
        "winter",
        "bread",
        "an old clock",
        "the moon",
        "a letter",
        "music",
        "rain",
        "maps",
    ]
    openings = [
        "Tell me about {}.",
        "Write a short story in which {} plays the main part, and somebody learns something from it.",
        "{}:",
        "Why does everybody in the village talk about {} today? Explain it step by step, with examples, and name at "
        "least three reasons that a child would understand; then say what the mayor should do about it next week.",
    ]
    return [openings[i % len(openings)].format(topics[i // len(openings) % len(topics)]) for i in range(count)]


def save_prompt(prompt: SoftPrompt, directory: Path, name: str) -> Path:
    from softbatch.prompt_store.soft_prompt_file import save

    path = directory / f"{name}.safetensors"
    save(prompt, path)
    return path
