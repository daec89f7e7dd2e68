"""Starts vLLM in fresh processes.

    echo '{"model": "FOLDER", "cache": "FOLDER", "log": "FILE"}' | python worker.py

Reads a job a line, and prints a line of JSON for each. Every job runs in a fork of this process, which has imported
vLLM and done nothing else, so that no job sees another, and none pays for the import. A job has

    model: the folder of a model.
    cache: the folder of all caches.
    log: the file for all that the start prints.
    engine: further arguments of `vllm.LLM`.
    environment: further environment variables.
    patches: what to call before the start: lists of a function's name in `patches` and its arguments.
    edits: what to call between generations: lists of a function's name in `edits` and its arguments.
    tokens: how many tokens to generate for each prompt.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Lines(logging.Filter):
    """Keeps what is logged. A filter, as vLLM sets up logging anew when it starts, which drops handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a line."""
        if record.levelno >= logging.INFO:
            self.lines.append(record.getMessage())
        return True


def prompts(count: int = 8) -> list[dict[str, list[int]]]:
    """Prompts of different lengths."""
    return [{"prompt_token_ids": [(7 * i + 3 * j) % 400 + 5 for j in range(5 + 3 * i)]} for i in range(count)]


def decoder_of(llm: Any) -> Any:
    """The decoder, which vLLM compiles; None where other processes have it."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = getattr(executor, "driver_worker", None)
    return worker.worker.model_runner.model.model if worker is not None else None


def start(job: dict[str, Any]) -> dict[str, Any]:
    """Start vLLM, generate, and say what happened."""
    import torch
    from torch._dynamo.utils import counters
    from vllm import LLM, SamplingParams
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    import edits
    import patches

    handler = Lines()
    logging.getLogger("vllm.glowplug").addFilter(handler)
    for name, *arguments in job.get("patches", ()):
        getattr(patches, name)(*arguments)
    begin = time.perf_counter()
    engine = {"skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", "max_num_seqs": 8}
    llm = LLM(model=job["model"], **(engine | job.get("engine", {})))
    ready = time.perf_counter()
    count = job.get("tokens", 64)
    sampling = SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True)

    def generate() -> list[list[int]]:
        outputs = llm.generate(prompts(), sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    tokens = generate()
    generated = time.perf_counter()
    after, lines_after = [], []
    for name, *arguments in job.get("edits", ()):
        before = len(handler.lines)
        with torch.no_grad():
            getattr(edits, name)(decoder_of(llm), *arguments)
        after.append(generate())
        lines_after.append(handler.lines[before:])
    return {
        "tokens": tokens,
        "after": after,
        "notes": patches.notes,
        "lines": handler.lines,
        "lines_after": lines_after,
        "ready_s": round(ready - begin, 2),
        "generate_s": round(generated - ready, 3),
        "graphs": counters["stats"]["unique_graphs"],
        "patched": hasattr(TorchCompileWithNoGuardsWrapper.__init__, "_glowplug_wrapped"),
        "prepared": "aot_compiled_fn" in getattr(decoder_of(llm), "__dict__", {}),
    }


def run(job: dict[str, Any], results: int) -> None:
    """Run a job in this process, a fork."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(VLLM_CACHE_ROOT=f"{job['cache']}/vllm", TORCHINDUCTOR_CACHE_DIR=f"{job['cache']}/inductor")
    os.environ.update(job.get("environment", {}))
    try:
        result = start(job)
    except BaseException as exc:
        traceback.print_exc()
        result = {"error": f"{type(exc).__name__}: {exc}"}
    with os.fdopen(results, "w") as pipe:
        json.dump(result, pipe)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Serve jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(SETTINGS)
    import vllm
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.v1.engine import llm_engine  # noqa: F401
    from vllm.v1.worker import cpu_worker  # noqa: F401

    print(json.dumps({"vllm": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.setpgid(0, 0)
            run(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        print(answer or json.dumps({"error": f"it died: status {status}"}), file=answers, flush=True)


if __name__ == "__main__":
    main()
