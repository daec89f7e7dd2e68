"""Measuring: the loader's errors, one measurement, isolation, the grid and its file, the table and the plot."""

from __future__ import annotations

import json
import multiprocessing
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, T5Config, ViTConfig

from glowplug.bench import runner
from glowplug.bench.measure import measure
from glowplug.bench.models import check_model, load_model, true_depth
from glowplug.bench.presets import build_model
from glowplug.bench.results import plot
from glowplug.bench.results.environment import describe_environment
from glowplug.bench.results.record import empty_record, error_record
from glowplug.bench.results.table import hoisted_cold_start, record_line, results_table
from glowplug.bench.spec import Spec
from glowplug.bench.stepping import relative_error
from glowplug.bench.strategies import DEFAULT_STRATEGIES, STRATEGIES, hit_recompile_limit, layer_stack
from glowplug.bench.workers.isolate import Isolated, IsolatedError
from glowplug.bench.workers.turns import FOLDER, Turner, take_turns
from glowplug.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved gpt-oss of three layers."""
    path = tmp_path_factory.mktemp("saved") / "model"
    build_model("gpt-oss-20b", depth=3).save_pretrained(path)
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be broken."""
    path = tmp_path / "broken"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


# -- loading ------------------------------------------------


def test_a_folder_loads_whole_and_cut(folder: Path) -> None:
    whole, cut = load_model(str(folder)), load_model(str(folder), depth=2)
    assert true_depth(str(folder)) == len(layer_stack(whole)) == 3
    assert cut.config.layer_types == whole.config.layer_types[:2]
    assert len(layer_stack(cut)) == 2
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight)


def test_a_vision_language_model_loads(tmp_path: Path) -> None:
    build_model("ernie-4.5-vl-28b-a3b", depth=2).save_pretrained(tmp_path / "vl")
    model = load_model(str(tmp_path / "vl"))
    assert type(model).__name__ == "Ernie4_5_VLMoeForConditionalGeneration"
    assert len(layer_stack(model)) == 2


def test_a_folder_is_not_deepened(folder: Path) -> None:
    with pytest.raises(UsageError, match="has 3 layers"):
        load_model(str(folder), depth=4)


def test_no_such_folder_and_no_model_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such preset or folder.*presets: gpt-oss-120b"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        load_model(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(architectures=["BertForMaskedLM"]),
        ViTConfig(architectures=["ViTModel"]),
        T5Config(architectures=["T5ForConditionalGeneration"]),
    ],
    ids=["bert", "vit", "t5"],
)
def test_what_is_no_causal_language_model_is_refused(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="not a causal language model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}', "{}", "[1]"])
def test_a_broken_config_is_refused(text: str, broken: Path) -> None:
    (broken / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        load_model(str(broken))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 64, lambda b: b""])
def test_corrupt_weights_are_refused(damage: Any, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for load in (load_model, check_model):
        with pytest.raises(UsageError, match="not a whole safetensors file") as caught:
            load(str(broken))
        assert "\n" not in str(caught.value)


def test_missing_weights_are_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "layer_types": [*config["layer_types"], "full_attention"]}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"lack \d+ tensors of the model"):
        load_model(str(broken))
    (broken / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no safetensors weights"):
        load_model(str(broken))


# -- measuring ------------------------------------------------


def spec(strategy: str, **changes: Any) -> Spec:
    """A small, quick measurement."""
    values = {"model": "gpt-oss-20b", "depth": 3, "compiler": "eager", "experts": "opaque", "steady_s": 0.05}
    return Spec(strategy=strategy, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["eager", "baked", "ordered", "hoisted"])
def test_a_measurement_has_every_field(strategy: str) -> None:
    record = measure(spec(strategy))
    assert record.keys() == empty_record(spec(strategy)).keys()
    assert json.loads(json.dumps(record)) == record
    assert record["cold_start_s"] > 0
    assert record["max_rel_err"] < 1e-4
    assert record["steady_ms"]["decode"] > 0
    assert record["steady_ms"]["prefill128"] > 0
    assert record["peak_rss_mb"] > 50
    assert record["error"] is None
    if strategy == "eager":
        assert (record["experts"], record["pieces"], record["phases"]) == ("inline", None, {})
    else:
        assert record["experts"] == "opaque"
        assert record["pieces"] == 4
        assert record["distinct_pieces"] <= 4
        assert record["phases"]["trace"] > 0


def test_hoisting_leaves_fewer_distinct_pieces_than_baking() -> None:
    baked, hoisted = (measure(spec(strategy, depth=6)) for strategy in ("baked", "hoisted"))
    assert hoisted["distinct_pieces"] < baked["distinct_pieces"]
    assert hoisted["pieces"] == baked["pieces"]


def test_a_wrong_result_is_no_measurement() -> None:
    ones = torch.ones(1, 2, 3)
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    with pytest.raises(RuntimeError, match="not finite"):
        relative_error(ones * float("nan"), ones)
    with pytest.raises(RuntimeError, match="shape"):
        relative_error(ones[:, :1], ones)


@pytest.mark.inductor
def test_torch_regional_compiles_the_layers() -> None:
    record = measure(spec("torch-regional", depth=1))
    assert record["compiler"] == "inductor"
    assert record["experts"] == "inline"
    assert record["max_rel_err"] < 1e-3


def test_dynamo_giving_up_is_noticed() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x, text: x + len(text), backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for text in ("a", "b"):
            compiled(torch.ones(2), text)
        assert not hit_recompile_limit()
        compiled(torch.ones(2), "c")
    assert hit_recompile_limit()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_torch_strategies_record_inline_experts_even_when_they_fail() -> None:
    record = error_record(spec("torch-nested"), "InductorError: no")
    assert (record["experts"], record["compiler"], record["error"]) == ("inline", "inductor", "InductorError: no")


# -- processes ------------------------------------------------

PROBE = """
import json, multiprocessing, os, sys, tempfile, time

def main():
    wanted = json.loads(sys.argv[1])
    if wanted == "sleep":
        time.sleep(60)
    if wanted == "die":
        os.abort()
    if wanted == "fail":
        raise ValueError("as asked")
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    print("some other output")
    found = {"folder": folder, "fresh": not os.path.exists(folder), "triton": os.environ["TRITON_CACHE_DIR"]}
    found |= {"temporary": tempfile.gettempdir(), "children": multiprocessing.get_start_method()}
    print(json.dumps(found | {"leader": os.getpid() == os.getsid(0) == os.getpgid(0)}))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that answers, sleeps, dies or fails."""
    (tmp_path / "isolation_probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for a new Python
    monkeypatch.syspath_prepend(tmp_path)  # for a fork
    return "isolation_probe"


def answer_of(probe: str, wanted: str, *, timeout_s: float = 30, forked: bool = False) -> dict[str, Any]:
    """What it answers in a process of its own."""
    with closing(Isolated(probe, json.dumps(wanted), timeout_s=timeout_s, forked=forked)) as process:
        return process.answer()


@pytest.mark.parametrize("forked", [False, True])
def test_each_process_has_fresh_caches_that_are_deleted(probe: str, forked: bool) -> None:
    one, two = (answer_of(probe, "answer", forked=forked) for _ in range(2))
    assert one["fresh"]
    assert one["leader"]
    assert one["folder"] != two["folder"]
    assert one["folder"] != one["triton"]
    assert one["temporary"] != two["temporary"]
    assert not Path(one["folder"]).parent.exists()
    assert one["children"] == multiprocessing.get_start_method()


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize(
    ("wanted", "message"),
    [("sleep", "timeout: not finished after 1 s"), ("die", "killed by SIGABRT"), ("fail", "ValueError: as asked")],
)
def test_a_process_without_an_answer_is_an_error(probe: str, wanted: str, message: str, forked: bool) -> None:
    with pytest.raises(IsolatedError, match=message):
        answer_of(probe, wanted, timeout_s=1 if wanted == "sleep" else 30, forked=forked)


# -- the grid ------------------------------------------------


def test_the_grid_is_every_strategy_at_every_depth() -> None:
    grid = runner.make_grid("glm-4.7", depths=[2, 4], strategies=["eager", "hoisted"], experts="opaque")
    assert [(s.depth, s.strategy) for s in grid] == [(2, "eager"), (2, "hoisted"), (4, "eager"), (4, "hoisted")]
    assert {s.dtype for s in grid} == {"float32"}
    assert runner.make_grid("glm-4.7", strategies=["eager"])[0].depth == 92
    assert set(DEFAULT_STRATEGIES) <= set(STRATEGIES)


def test_results_are_written_after_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    seen: list[int] = []

    def answer(module: str, argument: str, *, timeout_s: float) -> dict[str, Any]:
        if path.exists():
            seen.append(len(json.loads(path.read_text())["results"]))
        wanted = Spec(**json.loads(argument))
        if wanted.strategy == "torch-nested":
            raise IsolatedError("timeout: not finished after 5 s")
        return {**empty_record(wanted), "cold_start_s": 1.0}

    monkeypatch.setattr(runner, "run_isolated", answer)
    grid = runner.make_grid("glm-4.7", depths=[2], strategies=["eager", "torch-nested", "hoisted"])
    records = runner.run_grid(grid, environment={"cpu": "x"}, json_path=path, timeout_s=5)
    assert seen == [1, 2]
    assert json.loads(path.read_text()) == {"environment": {"cpu": "x"}, "results": records}
    assert [r["error"] for r in records] == [None, "timeout: not finished after 5 s", None]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_steady_states_in_turns(tmp_path: Path) -> None:
    """All processes live side by side; one that fails is a row, and the others go on."""
    strategies = ("eager", "stamped", "hoisted")
    grid = runner.make_grid("mixtral-8x22b", depths=[2], strategies=strategies, compiler="eager")
    grid[1] = replace(grid[1], model="no such model")
    path = tmp_path / "results.json"
    records = runner.run_grid(grid, environment={}, json_path=path, timeout_s=100, rounds=2)
    assert [record["strategy"] for record in records] == list(strategies)
    for record in records:
        failed = record["strategy"] == "stamped"
        assert (record["error"] is not None) == failed
        assert failed or min(record["steady_ms"].values()) > 0
    assert json.loads(path.read_text())["results"] == records


def test_a_process_that_never_asks_for_a_turn_is_stopped(probe: str) -> None:
    process = Isolated(probe, '"sleep"', timeout_s=0.5, extra={FOLDER: "{}"})
    turner = Turner(process)
    try:
        turner.wait_until_ready()
        take_turns([turner], rounds=2, timeout_s=0.5)
        with pytest.raises(IsolatedError, match=r"timeout: not finished after 0\.5 s"):
            process.answer()
    finally:
        process.close()


def test_an_unwritable_path_is_found_before_running(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such" / "file.json", tmp_path):
        with pytest.raises(UsageError, match="can't write"):
            runner.check_writable(path)
    runner.check_writable(tmp_path / "new.json")
    assert not list(tmp_path.iterdir())


def test_the_environment_names_machine_and_versions() -> None:
    environment = describe_environment()
    assert environment["torch"] == torch.__version__
    assert environment["cores"] >= 1
    assert environment["gpu"] is None
    for key in ("cpu", "ram_gb", "python", "transformers", "date", "command"):
        assert environment[key]


# -- table and plot ------------------------------------------------


def records() -> list[dict[str, Any]]:
    """Made-up records: two depths, one failure, one fallback."""
    made = []
    for depth in (2, 4):
        for strategy, cold in (("eager", 0.01), ("torch-regional", 8.0), ("torch-nested", None), ("hoisted", 4.0)):
            record = empty_record(spec(strategy, depth=depth))
            if cold is None:
                record["error"] = "RuntimeError: [no]"
            else:
                record |= {"cold_start_s": cold * depth, "max_rel_err": 1e-6, "peak_rss_mb": 500.0}
                record["steady_ms"] = {"decode": 1.0, "prefill128": 2.0}
            if strategy == "torch-regional":
                record["fallback"] = ["Dynamo hit its recompile limit"]
            made.append(record)
    return made


def test_the_table_compares_with_hoisted_at_the_same_depth() -> None:
    made = records()
    assert hoisted_cold_start(made, made[1]) == 8.0
    assert hoisted_cold_start(made[:2], made[1]) is None
    table = results_table(made)
    assert table.row_count == 8
    ratios = next(column for column in table.columns if "hoisted" in str(column.header))
    assert list(ratios.cells) == ["0.00", "2.00", "-", "1.00"] * 2
    assert record_line(made[2]).endswith("torch-nested: failed: RuntimeError: [no]")
    assert "note: Dynamo hit its recompile limit" in record_line(made[1])


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot.check_plot(path)
    plot.draw(records(), describe_environment(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_the_plot_refuses_what_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="png"):
        plot.check_plot(tmp_path / "plot.docx")
    with pytest.raises(UsageError, match="nothing to plot"):
        plot.draw([records()[2]], describe_environment(), tmp_path / "plot.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match=r"pip install 'glowplug\[plot\]'"):
        plot.check_plot(tmp_path / "plot.png")
