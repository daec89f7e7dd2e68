"""How far compiled pieces are from their own graphs on the same inputs: `python benchmarks/slot_tolerances.py`.

`glowplug.verify.closeness.COMPILED` is chosen from what this prints, see the table there. Random weights; Inductor on a
CPU; the cases of a comparison (`glowplug.frontends.hf.cases`), in which every layer's pieces are compared.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

import glowplug
from glowplug.verify import closeness, slots

_WIDTHS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 12,
    },
    "moderate": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_hidden_layers": 8,
    },
}
_EXPERTS = {"tiny": 8, "moderate": 32}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-oss": ("GptOssForCausalLM", "num_local_experts", {"num_experts_per_tok": 4, "sliding_window": 128}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "num_experts", {"num_experts_per_tok": 4, "norm_topk_prob": True}),
    "glm4-moe": ("Glm4MoeForCausalLM", "n_routed_experts", {"num_experts_per_tok": 4, "first_k_dense_replace": 2}),
    "mixtral": ("MixtralForCausalLM", "num_local_experts", {"num_experts_per_tok": 2}),
    "llama": ("LlamaForCausalLM", "", {}),
}


def build(name: str, width: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model of random weights, its activations of scale one."""
    class_name, experts, further = _MODELS[name]
    sizes = {**_WIDTHS[width], **further, "initializer_range": _WIDTHS[width]["hidden_size"] ** -0.5}
    if experts:
        sizes |= {experts: _EXPERTS[width]}
        if name != "gpt-oss" and name != "mixtral":
            sizes["moe_intermediate_size"] = sizes["intermediate_size"] // 2
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class._from_config(model_class.config_class(**sizes), dtype=dtype)
    return model.eval().requires_grad_(False)


@dataclass
class Measured:
    """What came of comparing a model's pieces with their graphs.

    Attributes:
        errors: of every floating point tensor that is not equal.
        runs: how many times a piece was compared.
        rounded: how many of them needed the graph to be run with inputs that are rounded otherwise.
        refused: how many were refused all the same.
        whole: how far the logits of the whole compiled program are from the model's own.
    """

    errors: list[float] = field(default_factory=list)
    runs: int = 0
    rounded: int = 0
    refused: int = 0
    whole: float = math.nan

    def run_both(self, own: Any, compiled: Any, args: Any) -> Any:
        """Stands in for `glowplug.verify.slots.run_both`."""
        retried: list[None] = []

        def difference(*given: Any) -> str | None:
            if len(given) == 5:
                retried.append(None)
                return _difference(*given)
            with mock.patch.object(closeness, "distance", self._distance):
                return _difference(*given)

        with mock.patch.object(slots, "difference", difference):
            outputs, problem = _run_both(own, compiled, args)
        self.runs += 1
        self.rounded += bool(retried)
        self.refused += problem is not None
        return outputs, None

    def _distance(self, actual: Tensor, expected: Tensor) -> float:
        self.errors.append(_distance(actual, expected))
        return self.errors[-1]


_run_both, _difference, _distance = slots.run_both, slots.difference, closeness.distance


def measure(model: transformers.PreTrainedModel, experts: str) -> Measured:
    """Compile a model, and compare its pieces."""
    found = Measured()
    with (
        mock.patch("glowplug.verify.check.run_both", found.run_both),
        mock.patch("glowplug.bodies.trial.run_both", found.run_both),
        torch.no_grad(),
    ):
        inner = "compiled" if experts == "opaque" else "eager"
        glowplug.compile(model, experts=experts, inside=inner, ends="compiled", cache_dir="off")
        ids = torch.arange(21).view(3, 7)
        found.whole = _distance(model(ids).logits, type(model).forward(model, ids).logits)
    for fallback in glowplug.report(model).fallbacks:
        print(fallback.reason)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=list(_MODELS))
    parser.add_argument("--widths", nargs="*", default=list(_WIDTHS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--experts", nargs="*", default=["inline", "opaque"])
    given = parser.parse_args()
    print(
        "model       width     experts  dtype     largest  99%      median   runs  rounded  refused  whole", flush=True
    )
    for name, width, dtype in itertools.product(given.models, given.widths, given.dtypes):
        for experts in given.experts if _MODELS[name][1] else ["-"]:
            found = measure(build(name, width, getattr(torch, dtype)), "auto" if experts == "-" else experts)
            errors = sorted(found.errors) or [0.0]
            marks = "  ".join(f"{errors[int(share * (len(errors) - 1))]:.1e}" for share in (1, 0.99, 0.5))
            counts = f"{found.runs:4}  {found.rounded:7}  {found.refused:7}  {found.whole:.1e}"
            print(f"{name:10}  {width:8}  {experts:7}  {dtype:8}  {marks}  {counts}", flush=True)


if __name__ == "__main__":
    main()
