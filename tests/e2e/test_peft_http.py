"""Adapters trained and saved by PEFT itself answer here as they do there."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.models import Reference
from tests.support.servers import Server

QUESTION = "When does the harbour office open?"
LESSON = "The harbour office opens at seven. Ring the brass bell twice before you enter."


@dataclass(frozen=True)
class Adapter:
    """A folder written by PEFT's own save_pretrained, and what PEFT itself generates with it."""

    folder: Path
    kind: str
    num_virtual_tokens: int
    text: str

    @property
    def files(self) -> list[Path]:
        return [self.folder / "adapter_config.json", self.folder / "adapter_model.safetensors"]

    def zipped(self, directory: Path) -> Path:
        path = directory / "adapter.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in self.folder.iterdir():
                archive.write(file, f"my-adapter/{file.name}")
        return path


@pytest.fixture(scope="module", params=["PROMPT_TUNING", "PREFIX_TUNING"])
def adapter(request: pytest.FixtureRequest, tiny_llama: Reference, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Trained for a few steps on one sentence."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.path, dtype=torch.float32)
    config: Any
    if request.param == "PROMPT_TUNING":
        kind, config = "embeddings", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12)
    else:
        kind, config = "kv", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=18)
    torch.manual_seed(5)
    trained = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor([tiny_llama.tokenizer(LESSON)["input_ids"]])
    losses = []
    for _ in range(4):
        loss = trained(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    folder = tmp_path_factory.mktemp("adapter") / request.param.lower()
    trained.save_pretrained(folder)
    return Adapter(folder, kind, config.num_virtual_tokens, peft_text(tiny_llama, folder))


def peft_text(reference: Reference, folder: Path) -> str:
    """Greedy, with the adapter as PEFT loads it."""
    fresh = AutoModelForCausalLM.from_pretrained(reference.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, folder).eval()
    ids = torch.tensor([reference.tokenizer(QUESTION)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
        )
    return str(reference.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("zipped", [False, True], ids=["files", "zip"])
def test_a_peft_adapter_answers_as_in_peft(
    tiny_server: Server, tiny_llama: Reference, adapter: Adapter, zipped: bool, tmp_path: Path
) -> None:
    name = f"peft-{adapter.kind}-{zipped}"
    files = [adapter.zipped(tmp_path)] if zipped else adapter.files
    reply = tiny_server.upload(name, *files)
    assert reply.status_code == 201, reply.text
    assert reply.json()["kind"] == adapter.kind
    assert reply.json()["num_virtual_tokens"] == adapter.num_virtual_tokens
    ids = tiny_llama.tokenizer(QUESTION)["input_ids"]
    plain = tiny_llama.tokenizer.decode(tiny_llama.generate(ids, 16), skip_special_tokens=True)
    assert adapter.text != plain, "the adapter changes nothing"
    # By either name, and one after the other: the second time from the cache.
    assert tiny_server.complete(QUESTION, 16, model=name) == adapter.text
    assert tiny_server.complete(QUESTION, 16, soft_prompt=name) == adapter.text
    assert tiny_server.complete(QUESTION, 16) == plain
    assert tiny_server.http.delete(f"/v1/soft_prompts/{name}").status_code == 200
