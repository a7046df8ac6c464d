"""Steps of softbatch's engine and of transformers, each in a process of its own: for `libraries.py`."""

from __future__ import annotations

import itertools
import time
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.libraries.step_worker import Measure, Options, serve, steps


def load_softbatch(options: Options) -> tuple[str, Measure]:
    """Scheduler and model as `softbatch serve` builds them, without the front end."""
    from softbatch.scheduler.engine.engine import build_engine
    from softbatch.scheduler.protocol import AddRequest, EngineConfig, SamplingParams

    config = EngineConfig(
        model=options["model"],
        dtype=options["dtype"],
        quantization=options["quantization"],
        device="cpu",
        max_batch_size=options["max_batch_size"],
        max_batch_tokens=options["max_batch_tokens"],
    )
    engine, _ = build_engine(config, lambda name, seconds, detail: None)
    request_ids = map(str, itertools.count())

    def measure(prompts: list[list[int]], outputs: int) -> dict[str, Any]:
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        tokens: dict[str, list[int]] = {}
        for prompt in prompts:
            request = AddRequest(request_id=next(request_ids), token_ids=prompt, params=params)
            tokens[request.request_id] = []
            engine.handle(request)
        seconds = []
        while engine.has_work:
            started = time.perf_counter()
            output = engine.step()
            seconds.append(time.perf_counter() - started)
            for found in output.outputs:
                tokens[found.request_id] += found.token_ids
        return steps(seconds, list(tokens.values()), outputs)

    return version("softbatch"), measure


def load_generate(options: Options) -> tuple[str, Measure]:
    """`generate` on a static batch; a stopping criterion that never stops sees when each token is there."""
    from transformers import StoppingCriteria

    model = _model(options)
    model.generation_config.eos_token_id = None

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times = [time.perf_counter()]

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    @torch.inference_mode()
    def measure(prompts: list[list[int]], outputs: int) -> dict[str, Any]:
        ids, clock = torch.tensor(prompts), Clock()
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=outputs,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        seconds = [after - before for before, after in itertools.pairwise(clock.times)]
        return steps(seconds, found[:, ids.shape[1] :].tolist(), outputs)

    return version("transformers"), measure


def load_generate_batch(options: Options) -> tuple[str, Measure]:
    """transformers' continuous batching, which cannot be asked for single steps."""
    from benchmarks.gpu.gpu_steps import generate_batch

    model = _model(options)
    return version("transformers"), lambda prompts, outputs: generate_batch(model, prompts, outputs)


def _model(options: Options) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"])).eval()


LOADERS = {"softbatch": load_softbatch, "generate": load_generate, "generate_batch": load_generate_batch}


def load(options: Options) -> tuple[str, Measure]:
    torch.set_num_threads(options["threads"])
    return LOADERS[options["library"]](options)


if __name__ == "__main__":
    serve(load)
