"""What layers hold tells them apart where their forward reads it, and only there."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_nets import DEPTH, OTHER, Block, Net, attribute, check, llama, net_with, reading, reason_of
from torch import Tensor, nn

import families
import glowplug

# -- closures, and all else that holds something -----------------------------------------------


def closure(k: float) -> Any:
    return lambda x: torch.relu(x) * k


def nested_closure(k: float) -> Any:
    inner = closure(k)
    return lambda x: inner(x)


def default(k: float) -> Any:
    def act(x: Tensor, scale: float = k) -> Tensor:
        return torch.relu(x) * scale

    return act


def keyword_default(k: float) -> Any:
    def act(x: Tensor, *, scale: float = k) -> Tensor:
        return torch.relu(x) * scale

    return act


def scaled(k: float, x: Tensor) -> Tensor:
    return torch.relu(x) * k


def partial(k: float) -> Any:
    return functools.partial(scaled, k)


class Act:
    """A callable object, whose method does the same."""

    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.k


class SlottedAct:
    __slots__ = ("k",)

    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.k


@dataclasses.dataclass
class Settings:
    k: float


def bound_method(k: float) -> Any:
    return Act(k).__call__


class ActModule(nn.Module):
    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.k


def module_in_a_list(k: float) -> Any:
    held = [ActModule(k)]
    return lambda x: held[0](x)


def in_containers(k: float) -> Any:
    held = {"all": [0, (k,)], "settings": Settings(k)}
    return lambda x: torch.relu(x) * held["all"][1][0] * held["settings"].k  # type: ignore[index,union-attr]


def function_with_attribute(k: float) -> Any:
    def act(x: Tensor) -> Tensor:
        return torch.relu(x) * act.k  # type: ignore[attr-defined]

    act.k = k  # type: ignore[attr-defined]
    return act


class Which(enum.Enum):
    ONE = 1.0
    TWO = 2.0


def enumerated(k: float) -> Any:
    which = Which(k)
    return lambda x: torch.relu(x) * (1.0 if which is Which.ONE else 2.0)


HOLDERS = [
    closure,
    nested_closure,
    default,
    keyword_default,
    partial,
    Act,
    SlottedAct,
    bound_method,
    module_in_a_list,
    in_containers,
    function_with_attribute,
    enumerated,
]


@pytest.mark.parametrize("make", HOLDERS, ids=lambda make: make.__name__)
def test_what_a_layer_holds_is_compared_by_content(make: Callable[[float], Any]) -> None:
    equal = check(net_with(attribute("act", lambda _: make(2.0))), verify="off")
    assert (equal.strategy, equal.fallbacks) == ("stamped", [])
    different = net_with(attribute("act", lambda index: make(2.0 if index >= OTHER else 1.0)))
    assert ".act" in reason_of(check(different, verify="off"))
    tail = net_with(attribute("act", lambda index: make(1.0 if index < 4 else 2.0)))
    check(tail, verify="off")


def test_a_closure_that_refers_to_its_own_layer() -> None:
    def give(layer: Any, index: int) -> None:
        layer.k = 1.0 if index < OTHER else 2.0
        layer.act = lambda x: torch.relu(x) * layer.k

    check(net_with(give), verify="off")
    assert (
        check(net_with(lambda layer, _: setattr(layer, "act", lambda x: layer.down.weight.sum() * x))).fallbacks == []
    )


def test_a_tensor_in_a_closure_is_never_taken_for_another() -> None:
    tensors = [torch.tensor(1.0), torch.tensor(2.0)]

    def make(index: int) -> Any:
        held = tensors[index >= OTHER]
        return lambda x: torch.relu(x) * held

    net = net_with(attribute("act", make))
    net.register_buffer("one", tensors[0])
    net.register_buffer("two", tensors[1])
    reason_of(check(net, verify="off"))


@pytest.mark.parametrize("pre", [False, True], ids=["after", "before"])
def test_hooks_with_another_number(pre: bool) -> None:
    def hook(k: float) -> Any:
        return (lambda module, args: (args[0] * k,)) if pre else (lambda module, args, output: output * k)

    def give(layer: Any, index: int, other: float) -> None:
        register = layer.register_forward_pre_hook if pre else layer.register_forward_hook
        register(hook(1.5 if index < OTHER else other))

    assert check(net_with(lambda layer, index: give(layer, index, 1.5)), verify="off").strategy == "stamped"
    assert check(net_with(lambda layer, index: give(layer, index, 2.5)), verify="off").strategy != "stamped"


def test_lists_that_the_model_looks_its_layers_up_in() -> None:
    class Scaling(Net):
        scales = [1.0] * DEPTH

        def forward(self, x: Tensor) -> Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x) * self.scales[index]
            return x

    same, net = Scaling().eval(), Scaling().eval()
    same.scales, net.scales = [2.0] * DEPTH, [1.0] * OTHER + [2.0] * (DEPTH - OTHER)
    assert check(same, verify="off").strategy == "stamped"
    assert "scales" in reason_of(check(net, verify="off"))


@pytest.mark.parametrize("verify", ["off", "once"])
def test_closures_in_a_transformers_model(verify: str) -> None:
    def make(k: float) -> Any:
        return lambda x: torch.nn.functional.silu(x) * k

    for k in (1.0, 3.0):
        model = llama()
        for index, layer in enumerate(model.model.layers):
            del layer.mlp.act_fn
            layer.mlp.act_fn = make(1.0 if index < OTHER else k)
        report = check(model, torch.randint(1, 64, (2, 5)), verify=verify)
        assert k != 1.0 or (report.strategy, report.fallbacks) == ("stamped", [])


# -- attributes that no forward reads ----------------------------------------------------------

UNREAD: dict[str, Callable[[int], Any]] = {
    "i": lambda index: index,
    "tag": lambda index: f"layer-{index}",
    "ratio": lambda index: index / 7,
    "pair": lambda index: (index, f"{index}"),
    "flag": lambda index: index % 5 == 3,
    "maybe": lambda index: None if index == 9 else index,
    "names": lambda index: [f"a{index}"],
    "meta": lambda index: {"index": index, f"key{index}": 0},
    "info": lambda index: types.SimpleNamespace(index=index),
    "settings": lambda index: Settings(index),
    "log": lambda index: logging.getLogger(f"layer{index}"),
    "call_me": lambda index: lambda: index,
    "mark": lambda _: object(),
    "layer_idx": lambda index: index,
    "shapes": lambda index: torch.zeros(index + 1),
}


@pytest.mark.parametrize("verify", ["off", "once"])
@pytest.mark.parametrize("name", UNREAD)
def test_an_attribute_that_nobody_reads(name: str, verify: str) -> None:
    report = check(net_with(attribute(name, UNREAD[name])), verify=verify)
    assert (report.strategy, report.fallbacks, report.template_layers) == ("stamped", [], 4)


def test_attributes_of_modules_in_the_layers() -> None:
    def give(layer: Any, index: int) -> None:
        layer.up.place, layer.down.place, layer.path = index, f"{index}.down", f"layers.{index}"

    assert check(net_with(give)).strategy == "stamped"
    net = nn.Sequential(*[Block() for _ in range(9)]).eval()
    for index, layer in enumerate(net):
        layer.number = index
    assert check(net).strategy == "stamped"


READ: dict[str, tuple[Callable[[Any], Any], Callable[[int], Any]]] = {
    "i": (lambda layer: layer.i, lambda index: index),
    "tag": (lambda layer: 2 if layer.tag == "layer-3" else 1, lambda index: f"layer-{index}"),
    "text": (lambda layer: 2 if layer.text.endswith("0") else 1, lambda index: f"layer-{index}"),
    "ratio": (lambda layer: layer.ratio, lambda index: 0.5 + index / 8),
    "pair": (lambda layer: layer.pair[1], lambda index: (0, index)),
    "meta": (lambda layer: layer.meta["index"], lambda index: {"index": index}),
    "looked_up": (lambda layer: vars(layer)["looked_up"], lambda index: index),
    "asked": (lambda layer: getattr(layer, "asked", 1), lambda index: index),
    "info": (lambda layer: layer.info.index, lambda index: types.SimpleNamespace(index=index)),
    "act_like": (lambda layer: layer.act_like(torch.ones(())), closure),
    "layer_idx": (lambda layer: 1.0 + layer.layer_idx, lambda index: index),
}


@pytest.mark.parametrize("verify", ["off", "once"])
@pytest.mark.parametrize("name", READ)
def test_an_attribute_that_is_read_is_named(name: str, verify: str) -> None:
    read, value = READ[name]
    reason = reason_of(check(net_with(attribute(name, value), reading(read)), verify=verify))
    assert f".{name} " in reason
    assert name not in ("i", "ratio", "tag", "layer_idx") or (repr(value(0)) in reason and repr(value(1)) in reason)


@pytest.mark.parametrize("name", READ)
def test_what_is_read_and_equal_is_stamped(name: str) -> None:
    read, value = READ[name]
    give = attribute(name, lambda _: value(3))
    report = check(net_with(lambda layer, index: (give(layer, index), setattr(layer, "j", index)), reading(read)))
    assert (report.strategy, report.fallbacks) == ("stamped", [])


def test_kinds_by_an_attribute_that_is_read() -> None:
    def give(layer: Any, index: int) -> None:
        layer.i, layer.big = index, index % 2 == 1

    report = check(net_with(give, reading(lambda layer: 2 if layer.big else 1)), verify="off")
    assert (report.strategy, report.fallbacks) == ("stamped", [])
    assert 4 <= report.template_layers < DEPTH


TABLES = [{"k": float(index)} for index in range(DEPTH)]


def test_an_object_that_is_reached_by_another_way() -> None:
    def read(layer: Any) -> float:
        return sum(table["k"] for table in TABLES) + layer.table["k"]

    assert ".table" in reason_of(check(net_with(attribute("table", TABLES.__getitem__), reading(read)), verify="off"))


def test_strict_raises_with_the_reason() -> None:
    net = net_with(attribute("scale", lambda index: 0.5 + index), reading(lambda layer: layer.scale))
    compiled = glowplug.compile(net, compiler="eager", strict=True)
    with torch.no_grad(), pytest.raises(glowplug.NotServableError, match=r"differ in \.scale 0.5; \.scale 1.5"):
        compiled(torch.randn(3, 8))


def test_layers_that_are_not_stamped_have_a_reason() -> None:
    def wide(index: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8 + index, 9 + index), nn.ReLU())

    assert "differ in 0.weight" in reason_of(check(nn.Sequential(*map(wide, range(8))).eval()))
    net = net_with(lambda layer, index: setattr(layer, "act", nn.SiLU() if index == 11 else nn.ReLU()))
    assert "act being a ReLU; act being a SiLU" in reason_of(check(net))
    check(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), strict=True)  # nothing repeats itself


def test_unread_attributes_of_a_transformers_model() -> None:
    model = families.gpt_oss(12).eval()
    for index, layer in enumerate(model.model.layers):
        layer.tag, layer.mlp.number, layer.self_attn.note = f"layer-{index}", index, {"i": index}
        layer.lock = threading.Lock()
    report = check(model, families.prompt(2, 5))
    assert (report.strategy, report.fallbacks) == ("stamped", [])


def test_read_attributes_of_a_transformers_model() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module, scale: float) -> None:
            super().__init__()
            self.inner, self.scale = inner, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    model = llama()
    for index, layer in enumerate(model.model.layers):
        layer.mlp = Scaled(layer.mlp, 0.5 + index)
    assert "mlp.scale 0.5; mlp.scale 1.5" in reason_of(check(model, torch.randint(1, 64, (2, 5)), verify="off"))
