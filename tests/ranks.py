"""What `test_distributed.py` runs in each of several processes: `python ranks.py SCENARIO FOLDER`, with the rank and
the number of ranks in the environment, as torchrun has them. Each writes what it found to `FOLDER/rank-N.json`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel, logging
from transformers.distributed import DistributedConfig

import glowplug
from glowplug import start as starting
from glowplug.engine import engine_of
from glowplug.verify import check

IDS = torch.arange(12).reshape(2, 6)


def load(folder: Path, distributed: bool = True) -> PreTrainedModel:
    """A saved model, over all ranks or whole."""
    given = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())} if distributed else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    return model.eval().requires_grad_(False)


def generate(model: PreTrainedModel) -> list[list[int]]:
    """Greedy tokens."""
    tokens: list[list[int]] = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()
    return tokens


def found(model: PreTrainedModel, whole: PreTrainedModel | None) -> dict[str, Any]:
    """What a compiled model gives, and what its report says."""
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        tokens = generate(model)
        report = glowplug.report(model)
        result: dict[str, Any] = {
            "strategy": report.strategy,
            "start": report.start,
            "distinct": report.distinct_pieces,
            "reasons": [fallback.reason for fallback in report.fallbacks],
            "tokens": tokens,
            "experts": report.experts,
        }
        if whole is not None:
            result["error"] = float((logits - whole(input_ids=IDS).logits).abs().max())
            result["expected"] = generate(whole)
    engine = engine_of(model)
    records = engine.compilation.records if engine is not None else None
    if records is not None:
        result["counts"] = dict(records.store.counts)
        result["problems"] = records.store.problems
    return result


def parallel(folder: Path) -> dict[str, Any]:
    """Tensor parallel models of two families, uncompiled pieces; then one whose ranks disagree."""
    result: dict[str, Any] = {}
    for name in ("glm", "gpt"):
        whole = load(folder / name, distributed=False)
        for experts in ("auto", "opaque") if name == "glm" else ("auto",):
            model = load(folder / name)
            before = {path: m.__dict__["forward"] for path, m in model.named_modules() if "forward" in m.__dict__}
            glowplug.compile(model, compiler="eager", experts=experts)
            result[f"{name} {experts}"] = found(model, whole)
            after = {p: m.__dict__["forward"] for p, m in model.named_modules() if p and "forward" in m.__dict__}
            result[f"{name} {experts}"]["forwards"] = [len(before), before == after]
    difference = check.difference
    if dist.get_rank() == 1:
        check.difference = lambda *_: "it is a test"
    glowplug.compile(model, compiler="eager")
    result["disagree"] = found(model, whole)
    check.difference = difference
    make = starting._make
    if dist.get_rank() == 1:
        starting._make = lambda *_: "no program here"
    glowplug.compile(model, compiler="eager")
    result["alone"] = found(model, whole)
    starting._make = make
    return result


def stored(folder: Path) -> dict[str, Any]:
    """A tensor parallel model through the compiler and a store: cold, then found there, then in the background."""
    whole, model = load(folder / "glm", distributed=False), load(folder / "glm")
    result = {}
    for start in ("cold", "warm", "background"):
        dist.barrier()
        glowplug.compile(model, cache_dir=folder / "store", background=start == "background")
        result[start] = found(model, whole)
        told = glowplug.report(model).elsewhere
        result[start]["elsewhere"] = told.reason if told is not None else None
    return result


def replicas(folder: Path) -> dict[str, Any]:
    """The same whole model in every rank, through one store."""
    model = load(folder / "gpt", distributed=False)
    dist.barrier()
    glowplug.compile(model, cache_dir=folder / "replicas", ends="compiled", inside="eager")
    return {"replica": found(model, load(folder / "gpt", distributed=False))}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {f.__name__: f for f in (parallel, stored, replicas)}

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    place = Path(sys.argv[2])
    outcome = SCENARIOS[sys.argv[1]](place)
    (place / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
