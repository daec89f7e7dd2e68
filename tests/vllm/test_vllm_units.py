"""Parts of the plug-in, without a start of vLLM."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

pytest.importorskip("vllm.envs")

from glowplug.errors import NotStampableError
from glowplug.frontends.vllm.fitness import why_left_alone
from glowplug.frontends.vllm.layers import Bound, Names, SourceBinder
from glowplug.frontends.vllm.pieces import SplittingOps, uninitialised
from glowplug.frontends.vllm.plugin import register, unregister
from glowplug.frontends.vllm.private import vllm
from glowplug.graph.sources import parse
from glowplug.graph.stamp import Own


class Attention(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer_name = name
        self.kind = "decoder"


class Layer(nn.Module):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.attention = Attention(f"{prefix}.attention")
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f"model.layers.{number}") for number in range(depth))
        self.norm = nn.LayerNorm(8)


def stack_of(model: Model) -> Any:
    """What `Names` needs of a stack."""
    return SimpleNamespace(path="layers", layers=list(model.layers))


NAME = "._modules['attention'].layer_name"
WEIGHT = "._modules['norm']._parameters['weight']"


# -- names -------------------------------------------------------------------------------------------------------


def test_a_name_is_found_in_its_layer() -> None:
    names = Names(stack_of(Model()))
    assert names.locate("model.layers.2.attention") == (2, NAME)
    assert names.locate("model.layers.0.attention") == (0, NAME)


@pytest.mark.parametrize(
    "name", ["model.layers.4.attention", "model.experts.2.attention", "head", "from_forward_context"]
)
def test_a_name_of_no_layer_is_none(name: str) -> None:
    assert Names(stack_of(Model())).locate(name) is None


def test_a_name_that_no_module_keeps_is_refused() -> None:
    with pytest.raises(NotStampableError, match=r"nothing in layer 1 has the name 'model\.layers\.1\.experts'"):
        Names(stack_of(Model())).locate("model.layers.1.experts")


def test_places_that_agree_in_one_layer_and_not_in_another_are_refused() -> None:
    model = Model()
    for number, layer in enumerate(model.layers):
        layer.also = layer.attention.layer_name if number != 3 else "model.layers.3.other"
    with pytest.raises(NotStampableError, match="layer 3 has several names where layer 1 has"):
        Names(stack_of(model)).locate("model.layers.1.attention")


def test_the_binder_finds_the_layer_and_its_neighbour() -> None:
    model = Model()
    binder = SourceBinder("layers", list(model.layers), frozenset({NAME}), vllm().LayerName)
    assert binder.find(1, Own(1, WEIGHT)) is model.layers[2].norm.weight
    assert binder.find(3, Own(0, NAME)) == vllm().LayerName("model.layers.3.attention")
    with pytest.raises(NotStampableError, match="layer 2 has no"):
        binder.find(2, Own(0, "._modules['gone']._parameters['weight']"))


# -- changes -----------------------------------------------------------------------------------------------------


def bound_to(model: Model) -> Bound:
    """Bound to the norm of each layer and of the model."""
    bound = Bound()
    for layer in model.layers:
        source = parse(f"L['layer']{WEIGHT}")
        assert source is not None
        bound.add(layer, source)
    source = parse("L['model']._modules['norm']._parameters['weight']")
    assert source is not None
    bound.add(model, source)
    return bound


def test_nothing_has_changed_at_first() -> None:
    model = Model()
    bound = bound_to(model)
    with torch.no_grad():
        model.layers[2].norm.weight.fill_(3)
    assert bound.is_current()


@pytest.mark.parametrize("layer", [0, 3, None])
def test_a_replaced_parameter_is_noticed(layer: int | None) -> None:
    model = Model()
    bound = bound_to(model)
    owner = model.norm if layer is None else model.layers[layer].norm
    owner.weight = nn.Parameter(owner.weight.detach().clone())
    assert not bound.is_current()
    assert bound_to(model).forms() == bound.forms()


def test_a_replaced_module_is_noticed() -> None:
    model = Model()
    bound = bound_to(model)
    model.layers[1].norm = nn.LayerNorm(8)
    assert not bound.is_current()


def test_a_deleted_parameter_is_noticed() -> None:
    model = Model()
    bound = bound_to(model)
    del model.layers[1].norm.weight
    assert not bound.is_current()


@pytest.mark.parametrize("form", ["dtype", "shape", "strides"])
def test_another_layout_is_told_apart(form: str) -> None:
    model = Model()
    before = bound_to(model).forms()
    weight = torch.ones(8)
    other = {"dtype": weight.double(), "shape": torch.ones(9), "strides": torch.ones(16)[::2]}[form]
    model.layers[1].norm.weight = nn.Parameter(other)
    assert bound_to(model).forms() != before


# -- pieces ------------------------------------------------------------------------------------------------------


def piece(run: Any) -> fx.GraphModule:
    """The graph of a function of x."""
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend=lambda gm, _: graphs.append(gm) or gm.forward)(torch.ones(4, 8))
    return graphs[0]


def test_outputs_without_content() -> None:
    def run(x: Any) -> Any:
        plain = torch.empty(4, 8)
        viewed = torch.empty(4, 8).view(8, 4).unsqueeze(0)
        filled = torch.empty(4, 8)
        filled.copy_(x)
        through_a_view = torch.empty(4, 8)
        through_a_view.view(-1).fill_(1)
        return plain, x + 1, viewed, filled, through_a_view, torch.empty_like(x), x.new_empty(3), torch.zeros(3)

    assert uninitialised(piece(run)) == (0, 2, 5, 6)


def test_views_of_what_was_filled_have_content() -> None:
    def run(x: Any) -> Any:
        memory = torch.empty(4, 8)
        before = memory.view(8, 4)
        memory.copy_(x)
        return before, memory.reshape(-1)

    assert uninitialised(piece(run)) == ()


def test_splitting_ops() -> None:
    ops = SplittingOps(frozenset({"aten::mm", "aten::add.Tensor"}))
    aten = torch.ops.aten
    assert ops.has(aten.mm.default) and ops.has(aten.mm.out) and ops.has(aten.mm)
    assert ops.has(aten.add.Tensor) and not ops.has(aten.add.Scalar)
    assert not ops.has(torch.add) and not ops.has("mm") and not ops.has(aten.bmm.default)
    graph = piece(lambda x: aten.mm.default(x, x.t()) + 1)
    assert [node.target for node in graph.graph.nodes if ops.cuts(node)] == [aten.mm.default]
    assert ops.is_in(graph) and not ops.is_in(piece(lambda x: x + 1))


def test_splitting_ops_of_a_configuration() -> None:
    """Where none are listed, those that vLLM would choose; and always those that write a cache."""
    default, listed = SplittingOps.of(SimpleNamespace(splitting_ops=None)), ["vllm::mine"]
    assert "vllm::unified_attention_with_output" in default.names
    own = SplittingOps.of(SimpleNamespace(splitting_ops=listed))
    assert "vllm::mine" in own.names and "vllm::unified_attention_with_output" not in own.names
    assert "vllm::unified_kv_cache_update" in own.names & default.names
    assert listed == ["vllm::mine"]


# -- forks -------------------------------------------------------------------------------------------------------

INDEXING = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from glowplug.compilers.gpu.notes import _index_without_guard

x = torch.arange(4 * 5 * 6).reshape(4, 5, 6)
rows, columns = torch.tensor([0, 3, 1]), torch.tensor([[0], [2]])
signed, mask = torch.tensor([-1, 0]), torch.arange(4) % 2 == 0
forms = [
    0, -1, slice(None), slice(1, 3), slice(-3, None), slice(None, None, 2), slice(7, 9), None, ..., (),
    (1, 2), (1, 2, 3), (slice(1, 3), 0), (0, slice(None), slice(1, 4, 2)), (None, 1, None), (..., 0), (..., None),
    (0, ...), (0, ..., 1), (..., 1, slice(2, 4)), (None, ..., None), (slice(None), None, 0), (1, 2, 3, ...),
    rows, (rows,), (rows, 1), (slice(None), rows), (rows, slice(1, 3)), (..., rows), (None, rows), (0, rows),
    (rows, rows), (columns, rows), (signed, ..., signed), (rows, slice(None), rows), (slice(None), rows, None, rows),
    (rows, None, rows), (rows, 0, rows), (0, rows, rows), (rows, rows, 0), (rows, ..., 0),
    mask, (mask, 0), (..., torch.ones(6, dtype=torch.bool)), [0, 2], ([0, 2], slice(None)), (0, [1, 2]),
    torch.tensor(2), (torch.tensor(2), 1), (slice(torch.tensor(1), torch.tensor(3)),), (slice(None), torch.tensor(0)),
    9, (0, 0, 0, 0), (0, 9), slice(None, None, -1), "a", 1.5,
]

def look(form):
    try:
        found = x[form]
        has_tensors = any(isinstance(item, torch.Tensor) for item in (form if isinstance(form, tuple) else [form]))
        return found.tolist(), tuple(found.shape), None if has_tensors else found.stride()
    except Exception as exc:
        return "it raises"

expected = [look(form) for form in forms]
shared = [x[form].data_ptr() for form in forms[:9]]
_index_without_guard()
wrong = [(form, own, found) for form, own in zip(forms, expected) if (found := look(form)) != own]
assert [x[form].data_ptr() for form in forms[:9]] == shared
x[0] = 7
assert x[0].eq(7).all()
assert make_fx(lambda y: y[1:, 0])(x)(x).shape == (3, 6)
for form, own, found in wrong:
    print(repr(form)[:80], "|", str(own)[-80:], "|", str(found)[-80:])
"""


def test_tensors_are_indexed_as_torch_does() -> None:
    """What a fork puts in the place of torch's indexing gives the same values and shapes, and the same views."""
    result = subprocess.run([sys.executable, "-c", INDEXING], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr[-2000:]


# -- the plug-in -------------------------------------------------------------------------------------------------


def config(compilation: Any = (), parallel: Any = (), lora: Any = None) -> Any:
    """vLLM's configuration as far as the plug-in asks for it, with changes."""
    shapes = SimpleNamespace(type=vllm().DynamicShapesType.BACKED, evaluate_guards=False)
    options = {
        "mode": vllm().CompilationMode.VLLM_COMPILE,
        "backend": "inductor",
        "use_inductor_graph_partition": False,
        "splitting_ops": ["vllm::unified_attention_with_output"],
        "cudagraph_copy_inputs": False,
        "dynamic_shapes_config": shapes,
    }
    ranks = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "tensor_parallel_size": 4, "enable_eplb": False}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(**{**options, **dict(compilation)}),
        parallel_config=SimpleNamespace(**{**ranks, **dict(parallel)}),
        lora_config=lora,
    )


def decoder(options: Any, **attributes: Any) -> Any:
    """A decoder with a configuration."""
    return SimpleNamespace(
        vllm_config=options, **{"_is_encoder": False, "layerwise_nvtx_tracing_enabled": False, **attributes}
    )


def test_a_decoder_with_usual_options_is_served() -> None:
    assert why_left_alone(decoder(config())) is None
    modes = vllm().CompilationMode
    assert why_left_alone(decoder(config({"mode": modes.DYNAMO_TRACE_ONCE, "splitting_ops": []}))) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compilation": {"backend": "eager"}}, "its compiler is 'eager'"),
        ({"compilation": {"mode": 1}}, "it is compiled in mode 1"),
        ({"compilation": {"use_inductor_graph_partition": True}}, "use_inductor_graph_partition"),
        ({"compilation": {"splitting_ops": []}}, "splitting_ops is empty"),
        ({"compilation": {"cudagraph_copy_inputs": True}}, "cudagraph_copy_inputs"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "it runs in 2 pipeline stages"),
        ({"parallel": {"data_parallel_size": 8}}, "it runs in 8 data parallel ranks"),
        ({"parallel": {"enable_eplb": True}}, "expert parallel load balancing"),
        ({"lora": object()}, "LoRA"),
    ],
)
def test_an_option_that_changes_compilation_leaves_the_decoder_to_vllm(options: dict[str, Any], reason: str) -> None:
    assert reason in str(why_left_alone(decoder(config(**options))))


def test_encoders_and_traced_layers_are_left_to_vllm() -> None:
    assert "encoders" in str(why_left_alone(decoder(config(), _is_encoder=True)))
    assert "NVTX" in str(why_left_alone(decoder(config(), layerwise_nvtx_tracing_enabled=True)))


def test_the_plug_in_is_installed_once_and_can_be_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = vllm().TorchCompileWithNoGuardsWrapper
    own = wrapper.__init__
    monkeypatch.setenv("GLOWPLUG_VLLM", "Off")
    register()
    assert wrapper.__init__ is own
    monkeypatch.delenv("GLOWPLUG_VLLM")
    try:
        register()
        installed = wrapper.__init__
        register()
        assert wrapper.__init__ is installed is not own
    finally:
        unregister()
    assert wrapper.__init__ is own
    unregister()
    assert wrapper.__init__ is own
