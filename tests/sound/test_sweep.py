"""The sweep over transformers' MoE families, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from glowplug.bench.families import build_family, depth_as_released, families, released_ropes
from glowplug.bench.sweep import Case, Row, markdown, try_family
from glowplug.cli import app
from glowplug.errors import UsageError


def test_families_are_the_moe_ones() -> None:
    found = families()
    assert {"gpt_oss", "mixtral", "deepseek_v3", "qwen3_next", "llama4_text"} <= set(found)
    assert not {"llama", "gpt2", "qwen3"} & set(found)


def test_a_small_model_of_a_family() -> None:
    model = build_family("deepseek_v3", 5)
    assert model.config.num_hidden_layers == 5
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with pytest.raises(UsageError, match="no MoE family 'llama'"):
        build_family("llama", 5)


@pytest.mark.parametrize(
    "family",
    [
        "olmoe",
        "qwen3_next",
        "jamba",
        "granitemoehybrid",
        "lfm2_moe",
        "llama4_text",
        "deepseek_v2",
        "deepseek_v4",  # a cache of compressed tokens beside that of keys
        "dots3_note_text",  # a config of each layer's own
        "gemma4_text",
        "jetmoe",  # experts that ask in Python how many tokens each gets
        "longcat_flash",
        "minimax",  # a class of caches of its own; decays by the layer's index, worked out when it is made
        "nemotron_h",  # experts that are layers
        "zaya",  # two masks a layer
    ],
)
def test_stamped_and_equal(family: str) -> None:
    row = try_family(Case(family=family, depth=24))
    assert row.reasons == []
    assert row.strategy == "stamped"
    assert row.template < 24
    assert row.error is not None and row.error < 1e-5


@pytest.mark.parametrize(
    ("family", "strategy", "reason"),
    [
        ("qwen4_exp_text", "eager", "computes with what lies in its cache, outside of the layers' own attention"),
        ("beam", "hoisted", "layers 0 and 1 differ in .attn_residual_add_idx 2; .attn_residual_add_idx 4"),
        ("flint", "hoisted", "how all of them follow each other: layers 21 to 23 do so as no layers before them"),
    ],
)
def test_what_is_not_stamped_has_a_reason(family: str, strategy: str, reason: str) -> None:
    row = try_family(Case(family=family, depth=24))
    assert (row.strategy, row.error) == (strategy, 0)
    assert reason in row.reasons[0]


def test_a_depth_that_ends_as_released() -> None:
    assert depth_as_released("flint", 24) == 25
    assert depth_as_released("flint", 25) == 25
    assert depth_as_released("mixtral", 24) == 24
    row = try_family(Case(family="flint", depth=25))
    assert (row.strategy, row.reasons) == ("stamped", [])


def test_the_page() -> None:
    row = Row(family="mixtral", depth=16, strategy="stamped", kinds=1, template=3, pieces=17, distinct=3, error=2e-7)
    text = markdown([row, Row(family="odd", depth=16, reasons=["a | b"])], "torch 9")
    assert "1 of 2 families stamped at 16 layers" in text
    assert "| mixtral | stamped | 1 | 3 | 17 | 3 | 2e-07 |  |" in text
    assert "a \\| b" in text
    assert "0 of 2 families stamped at 24 layers (flint: 25), tiny" in markdown(
        [Row(family="flint", depth=25), Row(family="doge", depth=24)], "torch 9"
    )


@pytest.mark.parametrize("name", ["phimoe (longrope)", "llama (dynamic)", "gemma3_text (linear)"])
def test_the_rope_of_released_checkpoints(name: str) -> None:
    assert name in released_ropes()
    row = try_family(Case(family=name, depth=24))
    assert (row.family, row.strategy, row.reasons) == (name, "stamped", [])
    assert row.error is not None and row.error < 1e-5


def test_the_page_counts_ropes_apart() -> None:
    rows = [Row(family="phi3", depth=24), Row(family="phi3 (longrope)", depth=24, strategy="stamped")]
    text = markdown(rows, "torch 9")
    assert "0 of 1 families stamped at 24 layers; 1 of 1 with the rope of released checkpoints" in text
    assert "| phi3 (longrope) | stamped |" in text


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "families.md"
    result = CliRunner().invoke(app, ["sweep", "--families", "mixtral", "--depth", "6", "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    assert "stamped" in result.stdout
    assert "| mixtral | stamped |" in page.read_text()


def test_wrong_input() -> None:
    for arguments, words in (
        (["--families", "llama"], "no MoE family llama"),
        (["--depth", "0"], "--depth must be 1 or more"),
        (["--experts", "all"], "experts must be one of"),
        (["--timeout", "0"], "--timeout must be more"),
        (["--markdown", "/no/such/folder/x.md"], "can't write"),
    ):
        result = CliRunner().invoke(app, ["sweep", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr
