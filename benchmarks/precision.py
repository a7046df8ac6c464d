"""How far each weight format is from the float32 model: KL per token of two example texts, and top-1 agreement.

python benchmarks/precision.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from scheduler.model.batch import Row, build_batch
from scheduler.model.cpu.decoder import DecoderForward, runs_in_one_call
from scheduler.model.kv_cache import KVCache
from scheduler.model.loader import load_transformers
from scheduler.model.source import EMBEDDED_ALIAS, resolve

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TOKENS, CHUNK, BLOCK = 1024, 256, 16
CPU = torch.device("cpu")


def log_probs(dtype: torch.dtype, weights: str | None) -> torch.Tensor:
    """[TOKENS, vocab], through the decoder in C++, or through transformers where `weights` is None."""
    model, tokenizer = load_transformers(resolve(EMBEDDED_ALIAS), dtype, CPU)
    text = "".join((EXAMPLES / name / "context.md").read_text() for name in ("manual", "policy"))
    tokens = tokenizer(text)["input_ids"][:TOKENS]
    if weights is None:
        model.set_attn_implementation("eager")
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
    if not runs_in_one_call(model, dtype):
        raise SystemExit("the kernels cannot be built here; see the warning above")
    attention = model.model.layers[0].self_attn
    kv_cache = KVCache(
        num_layers=model.config.num_hidden_layers,
        num_blocks=TOKENS // BLOCK,
        num_kv_heads=model.config.num_key_value_heads,
        block_size=BLOCK,
        head_dim=attention.head_dim,
        dtype=dtype,
        device=CPU,
    )
    decoder, blocks, found = DecoderForward(model, kv_cache, weights), list(range(TOKENS // BLOCK)), []
    for start in range(0, TOKENS, CHUNK):
        row = Row(start, tokens[start : start + CHUNK], blocks, range(CHUNK))
        found.append(decoder(build_batch([row], BLOCK, CPU)).clone())
    return torch.cat(found).log_softmax(-1)


@torch.inference_mode()
def main() -> None:
    exact = log_probs(torch.float32, None)
    print("| | KL to float32, mean | 95th percentile | top-1 agreement |\n|---|---|---|---|")
    for name, dtype, weights in (
        ("decoder, float32", torch.float32, "float32"),
        ("transformers, bfloat16", torch.bfloat16, None),
        ("decoder, bfloat16", torch.bfloat16, "bfloat16"),
        ("decoder, int8", torch.bfloat16, "int8"),
    ):
        own = log_probs(dtype, weights)
        kl = (exact.exp() * (exact - own)).sum(-1)
        agreed = (own.argmax(-1) == exact.argmax(-1)).float().mean()
        print(f"| {name} | {kl.mean():.5f} | {kl.quantile(0.95):.5f} | {agreed:.4f} |", flush=True)


if __name__ == "__main__":
    main()
