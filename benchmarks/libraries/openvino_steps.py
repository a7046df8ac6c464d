"""Steps of OpenVINO GenAI's continuous batching, in OpenVINO's own environment: for `libraries.py`."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy
import openvino
import openvino_genai

from benchmarks.libraries.step_worker import Measure, Options, serve, steps

PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


def load(options: Options) -> tuple[str, Measure]:
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 1
    scheduling.max_num_seqs = options["max_batch_size"]
    scheduling.max_num_batched_tokens = options["max_batch_tokens"]
    scheduling.enable_prefix_caching = False
    precision = PRECISIONS[options["dtype"]]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,  # left alone it is 8 bits wide
        "INFERENCE_NUM_THREADS": options["threads"],
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(options["model"], scheduling, "CPU", properties)
    request_ids = itertools.count()

    def measure(prompts: list[list[int]], outputs: int) -> dict[str, Any]:
        generation = openvino_genai.GenerationConfig()
        generation.max_new_tokens = outputs
        generation.ignore_eos = True
        generation.do_sample = False
        handles = [
            pipeline.add_request(next(request_ids), openvino.Tensor(numpy.array([prompt], numpy.int64)), generation)
            for prompt in prompts
        ]
        seconds = []
        while pipeline.has_non_finished_requests():
            started = time.perf_counter()
            pipeline.step()
            seconds.append(time.perf_counter() - started)
        return steps(seconds, [handle.read_all()[0].generated_ids for handle in handles], outputs)

    return openvino_genai.__version__, measure


if __name__ == "__main__":
    serve(load)
