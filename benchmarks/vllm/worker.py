"""One start of vLLM with dummy weights in this process; prints one line of JSON.

    python worker.py FOLDER '{"max_num_seqs": 64}'

The weights are larger than vLLM's own dummy ones, so that different prompts give different tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
SCALE = float(os.environ.get("SCALE", "0.03"))


def give_weights(own: Any, loader: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """vLLM's dummy weights, but larger, and norms of 1."""
    import torch

    own(loader, model, *args, **kwargs)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if not weight.is_floating_point():
            continue
        if weight.dim() == 1 and name.endswith("weight"):
            weight.data.fill_(1.0)
        else:
            generator = torch.Generator(weight.device).manual_seed(number)
            weight.data.uniform_(-SCALE, SCALE, generator=generator)


def _method(function: Any) -> Any:
    return lambda loader, *args, **kwargs: function(loader, *args, **kwargs)


def main() -> None:
    begin = time.perf_counter()
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import dummy_loader

    loader = dummy_loader.DummyModelLoader
    loader.load_weights = _method(functools.partial(give_weights, loader.load_weights))
    imported = time.perf_counter()
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "dtype": "bfloat16",
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.92,
    }
    llm = LLM(model=sys.argv[1], **(settings | json.loads(sys.argv[2])))
    ready = time.perf_counter()

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, detokenize=False, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def seconds(prompts: list[list[int]], count: int) -> float:
        start = time.perf_counter()
        generate(prompts, count)
        return time.perf_counter() - start

    one = [list(range(10, 26))]
    several = [[(7 * i + j) % 1000 + 10 for j in range(64)] for i in range(16)]
    first = seconds(one, 2)
    tokens = generate(one, 64) + generate([prompt[: 8 + 4 * i] for i, prompt in enumerate(several[:8])], 48)
    seconds(one, 20)
    each = min((seconds(one, 140) - seconds(one, 20)) / 120 for _ in range(2))
    seconds(several, 24)
    batch = min(seconds(several, 64) for _ in range(2))
    compilation = llm.llm_engine.vllm_config.compilation_config
    record = {
        "compile_s": round(compilation.compilation_time, 2),
        "import_s": round(imported - begin, 2),
        "ready_s": round(ready - imported, 2),
        "first_two_tokens_s": round(first, 3),
        "ms_a_token": round(1e3 * each, 3),
        "tokens_a_second_16": round(16 * 64 / batch, 1),
        "tokens": hashlib.sha256(repr(tokens).encode()).hexdigest()[:16],
        "tokens_of_prompts": tokens,
        "distinct_tokens": len({token for row in tokens for token in row}),
        "mode": str(compilation.mode),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "kv_cache_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    print("RECORD", json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
