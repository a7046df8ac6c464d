"""What a start keeps for later ones: they serve the same without transformers. What does not fit is found out anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softbatch.scheduler.model import earlier_start, loader
from softbatch.scheduler.model.batch import Row
from softbatch.scheduler.model.cpu.build import build as build_kernels
from softbatch.scheduler.model.earlier_start import EarlierStart, EarlierStarts, _checksum
from softbatch.scheduler.model.loader import Loaded, load
from softbatch.scheduler.model.source import EMBEDDED_ALIAS, resolve
from softbatch.scheduler.protocol import EngineConfig
from tests.support.families import SERVED, edit_weights, save_family

pytestmark = pytest.mark.skipif(not build_kernels(), reason="what is kept is for models that run in the C++ decoder")
ROOT = Path(__file__).resolve().parents[3]
# They bring tied heads, biases, norms of heads, merged products, scales, caps, windows, and layers without positions.
KINDS = [
    ("Qwen2, Qwen2.5", "float32"),
    ("Qwen3", "bfloat16"),
    ("Gemma 2", "float32"),
    ("Gemma 3", "bfloat16"),
    ("Phi-4-mini", "float32"),
    ("SmolLM3", "float32"),
    ("OLMo 3", "float32"),
    ("Granite", "bfloat16"),
]


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EarlierStarts:
    """Files are taken for settled as soon as they are written."""
    monkeypatch.setattr(earlier_start, "_SETTLED_SECONDS", 0.0)
    return EarlierStarts(tmp_path / "starts")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path, "llama", head_dim=32)  # so wide that its cache can be packed


def saved(tmp_path: Path, kind: str, **fields: object) -> Path:
    return save_family(tmp_path / kind, resolve(EMBEDDED_ALIAS).path, kind, **fields)


def start(path: Path, starts: EarlierStarts | None, **options: object) -> tuple[Loaded, bool]:
    """And whether it went on from another one."""
    settings = {"dtype": "float32", "device": "cpu", "kv_cache_gib": 0.01} | options
    phases: dict[str, str] = {}
    loaded = load(
        EngineConfig(model=str(path), **settings),
        lambda name, seconds, detail: phases.update({name: detail}),
        starts=starts,
    )
    return loaded, phases["yardstick"] == "of an earlier start"


def found_of(starts: EarlierStarts, model: Path) -> EarlierStart:
    of_state = starts.of(str(model), torch.float32)
    assert of_state is not None
    found = of_state.find()
    assert found is not None
    return found


def logits(loaded: Loaded) -> torch.Tensor:
    tokens = [(7 * i + 3) % 512 for i in range(40)]
    return loaded.runner.forward([Row(0, tokens, list(range(-(-40 // loaded.kv_cache.block_size))), range(40))]).clone()


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_the_next_start_serves_the_same(name: str, dtype: str, tmp_path: Path, starts: EarlierStarts) -> None:
    kind, fields = SERVED[name]
    path = saved(tmp_path, kind, **fields)
    first, went_on = start(path, starts, dtype=dtype)
    assert not went_on
    second, went_on = start(path, starts, dtype=dtype)
    assert went_on
    assert second.info == first.info
    assert torch.equal(logits(second), logits(first))


def test_grammars_are_about_the_same_tokens(model: Path, starts: EarlierStarts, tmp_path: Path) -> None:
    start(model, starts)
    found = found_of(starts, model)
    shutil.rmtree(tmp_path / "starts")  # as a cleaner of caches may do
    assert found.tokenizer().to_str() == resolve(str(model)).tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "options",
    [{"kv_cache_dtype": "int8"}, {"quantization": "int8"}, {"max_model_len": 32}, {"deterministic": True}],
    ids=str,
)
def test_other_options_go_on_from_it_too(options: dict[str, object], model: Path, starts: EarlierStarts) -> None:
    start(model, starts)
    expected, _ = start(model, None, **options)
    found, went_on = start(model, starts, **options)
    assert went_on
    assert found.info == expected.info
    assert torch.equal(logits(found), logits(expected))


def test_what_the_kept_logits_are_not_for_is_measured_anew(tmp_path: Path, starts: EarlierStarts) -> None:
    """Another dtype; windows that no sequence reaches any more; changed weights."""
    path = saved(tmp_path, "mistral", sliding_window=40)
    start(path, starts)
    assert not start(path, starts, dtype="bfloat16")[1]
    before, went_on = start(path, starts)
    assert went_on
    assert not start(path, starts, max_model_len=32)[1]  # which takes the place of the other
    assert start(path, starts, max_model_len=32)[1]
    edit_weights(path, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] * 2})
    changed, went_on = start(path, starts)
    assert not went_on
    assert changed.info.fingerprint != before.info.fingerprint


def test_kept_logits_that_do_not_fit_are_found_out(model: Path, starts: EarlierStarts, tmp_path: Path) -> None:
    """As if a file had changed without a trace."""
    expected, _ = start(model, starts)
    (numbers,) = (tmp_path / "starts").glob("*/start.safetensors")
    kept = load_file(numbers)
    save_file(kept | {"logits": kept["logits"].roll(1, -1)}, numbers)
    seal(numbers.parent)
    found, _ = start(model, starts)
    assert torch.equal(logits(found), logits(expected))
    again, went_on = start(model, starts)  # what was measured anew has taken its place
    assert went_on
    assert torch.equal(logits(again), logits(expected))


def seal(entry: Path) -> None:
    """As if it had been kept so."""
    names = ("start.json", "start.safetensors", "tokenizer.json")
    (entry / "sha256").write_text(_checksum({name: (entry / name).read_bytes() for name in names}))


@pytest.mark.parametrize("name", ["start.json", "start.safetensors", "tokenizer.json", "sha256"])
@pytest.mark.parametrize("damage", ["truncated", "a bit", "gone"])
def test_a_damaged_file_is_as_none(name: str, damage: str, model: Path, starts: EarlierStarts, tmp_path: Path) -> None:
    start(model, starts)
    (damaged,) = (tmp_path / "starts").glob(f"*/{name}")
    content = damaged.read_bytes()
    damaged.write_bytes(
        content[:-20] if damage == "truncated" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    )
    if damage == "gone":
        damaged.unlink()
    assert not start(model, starts)[1]
    assert start(model, starts)[1]


@pytest.mark.parametrize("field", ["num_key_value_heads", "hidden_size", "num_hidden_layers"])
def test_what_cannot_be_gone_on_from_is_read_anew(
    field: str, model: Path, starts: EarlierStarts, tmp_path: Path
) -> None:
    """Whatever fails on the way."""
    start(model, starts)
    (note,) = (tmp_path / "starts").glob("*/start.json")
    kept = json.loads(note.read_text())
    kept["outline"]["config"][field] = 7
    note.write_text(json.dumps(kept))
    seal(note.parent)
    assert start(model, starts)[0].info.fingerprint == start(model, None)[0].info.fingerprint


def test_files_that_change_while_they_are_read_are_not_relied_on(
    model: Path, starts: EarlierStarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = loader.read_model

    def read_and_change(*arguments: Any) -> Any:
        read = reading(*arguments)
        (model / "generation_config.json").write_text('{"eos_token_id": 5}')
        return read

    monkeypatch.setattr(loader, "read_model", read_and_change)
    start(model, starts)
    monkeypatch.setattr(loader, "read_model", reading)
    loaded, went_on = start(model, starts)
    assert not went_on
    assert 5 in loaded.info.eos_token_ids


def test_a_template_in_a_folder_counts_too(model: Path, starts: EarlierStarts) -> None:
    start(model, starts)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert not start(model, starts)[1]


def test_where_nothing_can_be_written_nothing_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    nowhere = EarlierStarts(tmp_path / "file" / "starts")
    start(model, nowhere)
    assert not start(model, nowhere)[1]


def test_files_that_just_changed_are_not_relied_on(
    model: Path, starts: EarlierStarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier_start, "_SETTLED_SECONDS", 3600.0)
    start(model, starts)
    assert not start(model, starts)[1]


def test_models_in_transformers_own_code_keep_nothing(tmp_path: Path, starts: EarlierStarts) -> None:
    path = saved(tmp_path, "gpt2")
    start(path, starts)
    assert not list(tmp_path.glob("starts/*"))


def test_those_used_longest_ago_go(tmp_path: Path, starts: EarlierStarts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier_start, "MOST_KEPT", 2)
    paths = [saved(tmp_path, kind) for kind in ("llama", "qwen2", "qwen3")]
    for seconds, path in enumerate(paths[:2]):
        start(path, starts)
        for entry in (tmp_path / "starts").iterdir():
            os.utime(entry, (seconds, seconds))
    start(paths[0], starts)  # used again, just now
    start(paths[2], starts)
    assert [start(paths[i], starts)[1] for i in (0, 2, 1)] == [True, True, False]


PROGRAM = """
import json, sys
from pathlib import Path
from typing import Any
from softbatch.scheduler.engine.engine import build_engine
from softbatch.scheduler.model.earlier_start import EarlierStart, EarlierStarts, _checksum
from softbatch.scheduler.protocol import EngineConfig

config = EngineConfig(model=sys.argv[1], dtype="float32", device="cpu", kv_cache_gib=0.01)
engine, ready = build_engine(config, lambda *phase: None, starts=EarlierStarts(Path(sys.argv[2])))
packages = {name.partition(".")[0] for name in sys.modules} | set(sys.modules)
print(json.dumps([ready.model.fingerprint, *sorted(packages & set(sys.argv[3:]))]))
"""
HEAVY = (
    "transformers",
    "accelerate",
    "sympy",
    "torch._dynamo",
    "torch.distributed.tensor",
    "triton",
    "scipy",
    "pandas",
)


def test_the_next_start_imports_no_transformers(model: Path, starts: EarlierStarts, tmp_path: Path) -> None:
    """Nor what that brings along, which takes longer to import than all else."""
    loaded, _ = start(model, starts)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "starts"), *HEAVY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [loaded.info.fingerprint]
