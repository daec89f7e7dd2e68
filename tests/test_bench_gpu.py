"""Measuring on a GPU: each figure, with a CPU in the GPU's place and made-up traces in the profiler's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from glowplug.bench import measure as measuring
from glowplug.bench import runner
from glowplug.bench.gpu import figures, launches
from glowplug.bench.gpu.decoding import NEW_TOKENS, WARM_UP, Clock, Decoder
from glowplug.bench.presets import build_config, build_model
from glowplug.bench.results.record import empty_record
from glowplug.bench.results.table import record_line, results_table
from glowplug.bench.spec import Spec
from glowplug.bench.strategies import GPU_STRATEGIES, STRATEGIES
from glowplug.bench.workers.isolate import IsolatedError, run_isolated
from glowplug.errors import UsageError
from test_cli import run

FIGURES = {
    "ready_s",
    "step_ms",
    "static_ms",
    "tokens_equal_eager",
    "launches",
    "dynamic_ms",
    "static_tokens_s_16",
    "graphs",
}


def spec(strategy: str, **changes: Any) -> Spec:
    """A small measurement on a GPU, with short steady states."""
    values = {"model": "gpt-oss-20b", "depth": 2, "compiler": "eager", "experts": "opaque", "steady_s": 0.02}
    return Spec(strategy=strategy, device="cuda", **{**values, **changes})  # type: ignore[arg-type]


class Profile:
    """Stands in for torch's profiler: two kernels a step, and one launch."""

    def __init__(self, activities: Any) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def export_chrome_trace(self, path: str) -> None:
        assert self.calls == ["start", "stop"]
        step = [event("kernel", "mm"), event("kernel", "argmax"), event("cuda_runtime", "cudaLaunchKernel")]
        Path(path).write_text(json.dumps({"traceEvents": step * 4}))


def event(category: str, name: str) -> dict[str, Any]:
    """An event of a trace."""
    return {"ph": "X", "cat": category, "name": name, "ts": 0, "dur": 1}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements for `cuda` that run on the CPU."""

    def load(name: str, *, depth: int | None, width: Any, device: str, dtype: str) -> Any:
        return build_model(name, depth=depth, width=width)

    monkeypatch.setattr(measuring, "load_model", load)
    monkeypatch.setattr(launches, "profile", Profile)


# -- one measurement ------------------------------------------------


@pytest.mark.parametrize("strategy", ["eager", "stamped"])
def test_a_measurement_has_every_figure(strategy: str, on_the_cpu: None) -> None:
    kept: list[dict[str, Any]] = []
    record = measuring.measure(spec(strategy), lambda record: kept.append(json.loads(json.dumps(record))))
    assert record.keys() == empty_record(spec(strategy)).keys()
    assert kept[-1] == record
    assert kept[0]["cold_start_s"] > 0 and kept[0]["gpu"].keys() == {"ready_s"}
    gpu = record["gpu"]
    assert gpu.keys() == FIGURES
    assert gpu["ready_s"] > record["cold_start_s"]
    assert min(gpu[name] for name in ("static_ms", "dynamic_ms", "static_tokens_s_16")) > 0
    assert gpu["tokens_equal_eager"] == 64
    assert gpu["launches"] == {"kernels": 2.0, "kernels_a_layer": 1.0, "host_launches": 1.0}
    assert gpu["graphs"] == (None if strategy == "eager" else {"count": 0, "seconds": 0.0, "bytes": 0})
    assert record["max_rel_err"] < 1e-4
    assert record["steady_ms"]["decode"] > 0
    assert record["fallback"] == []


def test_one_figure_that_fails_leaves_the_others(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = Decoder.step_s

    def fails(self: Decoder, ids: Any, cap_s: float, *, static: bool = True) -> float:
        if ids.shape[0] > 1:
            raise torch.OutOfMemoryError("no\nroom")
        return step_s(self, ids, cap_s, static=static)

    monkeypatch.setattr(Decoder, "step_s", fails)
    record = measuring.measure(spec("eager"))
    assert record["gpu"]["static_tokens_s_16"] == "OutOfMemoryError: no room"
    assert record["gpu"]["static_ms"] > 0 and record["error"] is None
    assert record_line(record).endswith("note: static_tokens_s_16: OutOfMemoryError: no room")


def test_only_transformers_own_strategy_lets_generate_compile(on_the_cpu: None) -> None:
    """It compiles in `generate` alone, so that its steps outside are not measured."""
    record = measuring.measure(spec("torch-static"))
    assert record["steady_ms"] == {"decode": None, "prefill128": None}
    assert record["gpu"]["static_ms"] > 0
    assert [name for name, strategy in STRATEGIES.items() if strategy.auto_compile] == ["torch-static"]


@pytest.mark.parametrize("auto_compile", [False, True])
def test_how_generate_is_called(auto_compile: bool) -> None:
    calls: list[dict[str, Any]] = []

    class Model:
        def generate(self, **arguments: Any) -> None:
            calls.append(arguments)

    decoder = Decoder(Model(), auto_compile)  # type: ignore[arg-type]
    for static in (True, False):
        decoder.generate(torch.zeros(2, 3, dtype=torch.long), Clock(1), static=static)
    static_call, default_call = calls
    assert static_call["cache_implementation"] == "static"
    assert static_call["disable_compile"] is not auto_compile
    assert static_call.keys() - default_call.keys() == {"cache_implementation", "disable_compile"}
    assert static_call["max_new_tokens"] == NEW_TOKENS and not static_call["do_sample"]


# -- the clock ------------------------------------------------


def test_the_clock_stops_after_its_tokens() -> None:
    seen: list[int] = []
    clock = Clock(3, on_token=seen.append)
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert [clock(ids, None).tolist() for _ in range(3)] == [[False] * 2, [False] * 2, [True] * 2]
    assert seen == [1, 2, 3]


def test_the_clock_times_steps_after_the_warm_up_until_the_cap() -> None:
    clock, ids = Clock(NEW_TOKENS, cap_s=0.0), torch.zeros(1, 5, dtype=torch.long)
    assert [bool(clock(ids, None)) for _ in range(WARM_UP + 1)] == [False] * WARM_UP + [True]
    clock.times = [float(2**n) for n in range(WARM_UP)] + [2.0**15 + 1, 2.0**15 + 3, 2.0**15 + 4]
    assert clock.step_s() == 1.0
    assert math.isinf(Clock(1).cap_s)


def test_tokens_are_equal_up_to_the_first_that_is_not() -> None:
    assert figures.leading_equal([1, 2, 3], [1, 2, 3]) == 3
    assert figures.leading_equal([1, 5, 3], [1, 2, 3]) == 1
    assert figures.leading_equal([1, 2], [1, 2, 3]) == 2


# -- launches ------------------------------------------------


def test_kernels_and_launches_are_told_from_copies() -> None:
    events = [
        event("kernel", "mm"),
        event("kernel", "triton_red_fused_0"),
        event("gpu_memcpy", "Memcpy DtoD"),
        event("gpu_memset", "Memset"),
        event("cuda_runtime", "cudaLaunchKernelExC"),
        event("cuda_runtime", "cudaGraphLaunch"),
        event("cuda_runtime", "cudaMemcpyAsync"),
        event("cuda_runtime", "cudaDeviceSynchronize"),
        event("cuda_driver", "cuLaunchKernelEx"),
        event("cpu_op", "aten::mm"),
        {"ph": "M", "name": "process_name"},
    ]
    assert launches.count_events(events) == (2, 3)


def test_a_trace_without_kernels_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Profile):
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text('{"traceEvents": []}')

    monkeypatch.setattr(launches, "profile", Blind)
    model = build_model("qwen3-dense", depth=1)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        launches.count_launches(Decoder(model), torch.ones(1, 4, dtype=torch.long), layers=1)


# -- the grid, the process and the table ------------------------------------------------


def test_what_needs_a_gpu_is_refused_on_a_cpu() -> None:
    with pytest.raises(UsageError, match="torch-static needs --device cuda"):
        runner.make_grid("glm-4.7", strategies=["eager", "torch-static"])
    result = run("bench", "glm-4.7", "--strategies", "torch-static")
    assert result.exit_code == 2 and "torch-static needs --device cuda" in result.output


def test_the_dtype_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "resolve_device", torch.device)
    for device, dtype, expected in (
        ("cuda", None, "bfloat16"),
        ("cuda", "float16", "float16"),
        ("cpu", None, "float32"),
    ):
        (one,) = runner.make_grid("glm-4.7", strategies=["eager"], device=device, dtype=dtype)
        assert one.dtype == expected
    grid = runner.make_grid("glm-4.7", strategies=GPU_STRATEGIES, device="cuda")
    assert [one.strategy for one in grid] == list(GPU_STRATEGIES)
    assert run("bench", "glm-4.7", "--dtype", "int8").exit_code == 2


def test_a_process_that_takes_too_long_leaves_what_it_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "import time\nprint('{\"cold_start_s\": 2.0}', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "slow_probe.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(IsolatedError, match="timeout") as caught:
        run_isolated("slow_probe", '"x"', timeout_s=3)
    assert caught.value.answer == {"cold_start_s": 2.0}

    def too_long(*arguments: Any, **options: Any) -> Any:
        raise caught.value

    monkeypatch.setattr(runner, "run_isolated", too_long)
    (record,) = runner.run_grid([spec("eager")], environment={})
    assert (record["cold_start_s"], record["strategy"]) == (2.0, "eager")
    assert record["error"] == "timeout: not finished after 3 s"


def test_the_table_of_a_gpu() -> None:
    measured, slow, failed = (empty_record(spec(name)) for name in ("stamped", "torch-static", "eager"))
    measured |= {"cold_start_s": 20.0, "pieces": 5, "distinct_pieces": 3, "cuda_peak_mb": 43000.0, "max_rel_err": 0.01}
    measured["gpu"] = {
        "ready_s": 21.0,
        "step_ms": 3.0,
        "static_ms": 4.0,
        "dynamic_ms": 8.0,
        "static_tokens_s_16": 1500.0,
        "launches": {"kernels": 200.0, "kernels_a_layer": 8.0, "host_launches": 12.0},
        "graphs": {"count": 2, "seconds": 0.5, "bytes": 64 << 20},
        "tokens_equal_eager": 64,
    }
    slow |= {"cold_start_s": 90.0, "error": "timeout: not finished after 200 s"}
    slow["gpu"] = {"ready_s": 95.0, "launches": "RuntimeError: no"}
    failed["error"] = "OutOfMemoryError: no"
    table = results_table([measured, slow, failed])
    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert rows[0] == (
        *(
            "2",
            "stamped",
            "opaque",
            "20.00",
            "21.00",
            "3/5",
            "3.00",
            "4.00",
            "8.00",
            "1500",
            "8.0",
            "12",
            "64",
            "43000",
        ),
        "",
    )
    assert rows[1][2:6] == ("inline", "90.00", "95.00", "-")
    assert rows[1][-1] == "failed: timeout: not finished after 200 s; launches: RuntimeError: no"
    assert set(rows[2][3:-1]) == {"-"}
    assert "a token 4.00 ms over a static cache" in record_line(measured)


@pytest.mark.parametrize(("name", "experts"), [("gpt-oss-20b", 32), ("qwen3-30b-a3b", 128), ("gpt-oss-120b", 8)])
def test_models_that_fit_a_gpu_have_all_their_experts_at_full_width(name: str, experts: int) -> None:
    config = build_config(name, width="full")
    assert (config.num_experts if name.startswith("qwen3") else config.num_local_experts) == experts
