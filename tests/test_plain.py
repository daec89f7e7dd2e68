"""Plain modules are stamped too: cut at their layers or at their ops, compared on twins, watched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowplug
from glowplug.graph.split import OpStep, Piece, Step
from glowplug.layers.stack import find_repetition


class Block(nn.Module):
    """A residual layer without any op to cut at."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding, blocks, a head."""

    def __init__(self, depth: int = 16, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * scale


class Appending(nn.Module):
    """A layer whose op has a state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(append(self, x)))


@glowplug.layer_op("test_plain::append", fake=lambda x: torch.empty_like(x), splitting=True)
def append(layer: Appending, x: Tensor) -> Tensor:
    """Keeps what it saw, and adds how often it ran."""
    layer.seen = torch.cat([layer.seen, x.sum().reshape(1)])
    return x + layer.seen.numel()


class Gain(nn.Module):
    """A layer whose op is no place to cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(gain(self, x)) + x


@glowplug.layer_op("test_plain::gain", fake=lambda x: torch.empty_like(x))
def gain(layer: Gain, x: Tensor) -> Tensor:
    return x * layer.weight


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape)


def eager(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return type(model).forward(model, *args, **kwargs)


def quiet(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def check(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The compiled module answers as its own forward does."""
    torch.testing.assert_close(
        quiet(model, *args, **kwargs), eager(model, *args, **kwargs), rtol=1e-5, atol=1e-5, msg=str(args)
    )


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return glowplug.compile(model.eval(), compiler="eager", **options)


def expect_stamped(model: nn.Module, template: int | None = None) -> None:
    report = glowplug.report(model)
    assert (report.strategy, report.fallbacks) == ("stamped", [])
    assert template is None or report.template_layers == template


def test_cut_at_layers() -> None:
    model = compiled(Net(16))
    check(model, ids(2, 5))
    expect_stamped(model, template=4)
    report = glowplug.report(model)
    assert (report.pieces, report.distinct_pieces) == (18, 3)
    assert "for " in report.sources[0]


def test_every_size() -> None:
    model = compiled(Net(12))
    for shape in [(2, 5), (2, 5), (3, 7), (1, 5), (4, 1), (1, 1), (9, 2)]:
        check(model, ids(*shape))
    expect_stamped(model)
    assert glowplug.report(model).programs == 4


def test_only_the_template_is_traced() -> None:
    model = compiled(Net(40), verify="off")
    quiet(model, ids(2, 3))
    expect_stamped(model, template=4)
    engine: Any = model.forward
    reads = engine.compilation.reads
    layers = {match[1] for read in reads if (match := re.search(r"'layers'\]\._modules\['(\d+)", read))}
    assert layers == {"0", "1", "2", "3"}


def test_sequential_is_a_stack() -> None:
    model = compiled(nn.Sequential(*[Block() for _ in range(10)]))
    check(model, torch.randn(3, 8))
    expect_stamped(model)


def test_a_stack_between_others() -> None:
    parts = [nn.Linear(8, 8), nn.Sequential(*[Block() for _ in range(10)]), nn.Linear(8, 8)]
    model = compiled(nn.Sequential(*parts))
    check(model, torch.randn(3, 8))
    expect_stamped(model)


@pytest.mark.parametrize("block", [Gain, Appending], ids=lambda block: block.__name__)
def test_ops_with_and_without_cuts(block: Callable[[], nn.Module]) -> None:
    model, own = compiled(Net(12, block)), Net(12, block).eval()
    own.load_state_dict(model.state_dict())
    for shape in [(2, 5), (2, 5), (3, 4)]:
        x = ids(*shape)
        torch.testing.assert_close(quiet(model, x), eager(own, x))
    expect_stamped(model)


def test_state_behind_ops_is_touched_once_a_call() -> None:
    model = compiled(Net(12, Appending))
    for calls in (1, 2, 3):
        quiet(model, ids(2, 5))
        assert [layer.seen.numel() for layer in model.layers] == [calls] * 12  # type: ignore[union-attr]


def test_structures_in_and_out() -> None:
    class Structured(Net):
        def forward(self, batch: dict[str, Any], twice: bool = False) -> Any:  # type: ignore[override]
            x = super().forward(batch["ids"]) + batch["rest"][0]
            return {"x": x * 2 if twice else x, "parts": (x, [x + 1])}

    model = compiled(Structured(12))
    for twice in (False, True, False):
        check(model, {"ids": ids(2, 3), "rest": [torch.randn(20)]}, twice=twice)
    expect_stamped(model)
    assert glowplug.report(model).programs == 2


def test_buffers_written_in_the_graph() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(x.sum((0, 1)))
            return super().forward(x) + self.total

    model, own = compiled(Net(12, Counting)), Net(12, Counting).eval()
    own.load_state_dict(model.state_dict())
    for _ in range(3):
        x = ids(2, 5)
        torch.testing.assert_close(quiet(model, x), eager(own, x), rtol=1e-4, atol=1e-4)
    for layer, other in zip(model.layers, own.layers, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(layer.total, other.total)


# -- what can't be stamped is traced in full, and says so --------------------------------------


class Numbered(Block):
    """Looks up what to do by its index, in a helper."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * scale_of(self)


def scale_of(layer: nn.Module) -> float:
    return 1.5 if getattr(layer, "layer_idx", 0) == 9 else 1.0


class Remembers(Block):
    """Sets an attribute in its forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


class Backwards(Net):
    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        x = self.embed(ids)
        for layer in reversed(self.layers):
            x = layer(x)
        return self.head(x)


class Twice(Net):
    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        x = self.embed(ids)
        for layer in [*self.layers, *self.layers]:
            x = layer(x) * 0.5
        return self.head(x)


class Far(Net):
    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        kept = [self.embed(ids)]
        for layer in self.layers:
            kept.append(layer(kept[-1]) + 0.1 * kept[max(0, len(kept) - 3)])
        return self.head(kept[-1])


class Breaks(Net):
    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(ids)


class Uncopyable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.file = (number for number in range(3))


def numbered() -> Net:
    model = Net(16, Numbered)
    for index, layer in enumerate(model.layers):
        layer.layer_idx = index
    return model


@pytest.mark.parametrize(
    "make",
    [numbered, lambda: Net(16, Remembers), Backwards, Twice, Far, Breaks, Uncopyable],
    ids=["numbered", "remembers", "backwards", "twice", "far", "breaks", "uncopyable"],
)
def test_not_stamped(make: Callable[[], Net]) -> None:
    model = compiled(make())
    for shape in [(2, 5), (3, 6)]:
        check(model, ids(*shape))
    report = glowplug.report(model)
    assert report.strategy == "hoisted"
    assert "can't stamp" in report.fallbacks[0].reason


def test_strict_raises() -> None:
    model = compiled(numbered(), strict=True)
    with pytest.raises(glowplug.NotServableError, match="can't stamp"):
        quiet(model, ids(2, 5))


def test_stamp_off_and_other_identities() -> None:
    for options in ({"stamp": "off"}, {"identity": "baked"}):
        model = compiled(Net(12, Appending), **options)
        quiet(model, ids(2, 3))
        assert glowplug.report(model).strategy == options.get("identity", "hoisted")
        assert glowplug.report(model).template_layers == 0


def test_arguments_that_are_no_plain_tensors() -> None:
    model = compiled(nn.Sequential(*[Block() for _ in range(8)]))
    check(model, torch.randn(8, 3).t())
    assert glowplug.report(model).strategy == "hoisted"
    check(model, torch.randn(3, 8))
    assert glowplug.report(model).strategy == "stamped"


def test_grad_mode_runs_eager() -> None:
    model = compiled(Net(12))
    model(ids(2, 3)).sum().backward()
    assert model.layers[7].up.weight.grad is not None  # type: ignore[union-attr,index]
    assert glowplug.report(model).fallbacks[0].to == "eager"


# -- changes -----------------------------------------------------------------------------------


def set_weight(model: Net) -> None:
    with torch.no_grad():
        model.layers[9].up.weight.mul_(2)


def set_data(model: Net) -> None:
    model.layers[9].up.weight.data = torch.randn(16, 8)


def replace_parameter(model: Net) -> None:
    model.layers[9].up.weight = nn.Parameter(torch.randn(16, 8))


def replace_layer(model: Net) -> None:
    model.layers[9] = Block()


def replace_by_another(model: Net) -> None:
    model.layers[9] = nn.Tanh()


def add_hook(model: Net) -> None:
    model.layers[9].register_forward_hook(lambda module, args, output: output + 1)


def drop(model: Net) -> None:
    model.layers = model.layers[:7]


def to_double(model: Net) -> None:
    model.to(torch.float64)


def load(model: Net) -> None:
    model.load_state_dict(Net(16).state_dict(), assign=True)


CHANGES = [set_weight, set_data, replace_parameter, replace_layer, replace_by_another, add_hook, drop, to_double, load]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_never_stale(change: Callable[[Net], None]) -> None:
    model = Net(16)
    compiled(model)
    before = quiet(model, ids(2, 5) * 0)
    change(model)
    assert not torch.equal(eager(model, ids(2, 5) * 0).float(), before)
    for shape in [(2, 5), (3, 4)]:
        check(model, ids(*shape))


def test_many_changes_end_in_a_full_trace() -> None:
    model = Net(10)
    compiled(model)
    for seed in range(8):
        torch.manual_seed(seed)
        model.layers[seed % 10] = Block()
        check(model, ids(2, 5))
    assert glowplug.report(model).strategy in ("stamped", "hoisted")
    assert any("changed" in fallback.reason for fallback in glowplug.report(model).fallbacks)


# -- its parts ---------------------------------------------------------------------------------


def test_which_stack_is_chosen() -> None:
    stack = find_repetition(Net(9))
    assert stack is not None and (stack.path, len(stack.layers)) == ("layers", 9)
    assert find_repetition(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) is None
    assert find_repetition(nn.Linear(2, 2)) is None
    inner = nn.Sequential(*[nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]) for _ in range(12)])
    found = find_repetition(inner)
    assert found is not None and (found.path, len(found.layers)) == ("", 12)


def test_two_modules_of_one_class_do_not_meet() -> None:
    one, other = compiled(Net(12)), compiled(Net(12))
    for model in (one, other, one):
        check(model, ids(2, 5))
        expect_stamped(model)


def test_steps_know_their_layer() -> None:
    from glowplug.graph.capture import Captured, capture
    from glowplug.graph.split import split

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return type(model).forward(model, x)

    def layer_of(node: Any) -> int | None:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            parts = path.split(".")
            if len(parts) > 2 and parts[1] == "layers":
                return int(parts[2])
        return None

    def consume(captured: Captured) -> list[Step]:
        return split(captured, layer_of=layer_of)[0]

    steps = capture(call, (Net(3).eval(), ids(2, 3)), consume)
    assert all(isinstance(step, (Piece, OpStep)) for step in steps)
    assert [step.layer for step in steps] == [None, 0, 1, 2, None]


@pytest.mark.inductor
def test_through_inductor() -> None:
    model = glowplug.compile(Net(12).eval())
    for shape in [(2, 5), (3, 4)]:
        check(model, ids(*shape))
    expect_stamped(model)
