"""Models that try to fool stamping: layers that look alike and are not, stacks that run in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP, Qwen3Model

DEPTH, FAR = 9, 6
"""The layers of a model, and one beyond the four of its template: two like all others follow it."""

# -- layers that do something of their own --------------------------------------------------------------------


def helper(layer: nn.Module, x: Tensor) -> Tensor:
    """Out of sight of the class."""
    return x * (1.5 if layer.layer_idx > FAR else 1.0)


def flag_helper(layer: nn.Module, x: Tensor) -> Tensor:
    return x * 1.5 if getattr(layer, "special", False) else x


TABLE = {index: 1.0 + 0.1 * (index == 7) for index in range(12)}
SCALES = {"now": 1.0}
KEPT: dict[str, Tensor] = {}
CALLS = {"layers": 0}


class Scaled(Qwen3DecoderLayer):
    """A decoder layer whose output is changed by `change`."""

    def change(self, x: Tensor) -> Tensor:
        """To be overridden."""
        return x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(super().forward(*args, **kwargs))


class Flag(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * 1.5 if self.special else x


class FlagInHelper(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return flag_helper(self, x)


class Modulo(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * 1.5 if self.layer_idx % 3 == 2 else x


class Beyond(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * 1.5 if self.layer_idx > FAR else x


class BeyondInHelper(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return helper(self, x)


class Slightly(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return slightly(self, x)


def slightly(layer: nn.Module, x: Tensor) -> Tensor:
    return x * 1.001 if layer.layer_idx == 5 else x


class LookedUp(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * TABLE[self.layer_idx]


class LookedUpElsewhere(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return look_up(self, x)


def look_up(layer: nn.Module, x: Tensor) -> Tensor:
    return x * TABLE[layer.layer_idx]


class OwnName(Scaled):
    """Looks something up by the name that it holds of itself."""

    def change(self, x: Tensor) -> Tensor:
        return x * 1.001 if self.name in SPECIAL else x


class OwnNameInDict(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * 1.001 if self.settings["name"] in SPECIAL else x


SPECIAL = ("model.layers.5",)


class FloatScale(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * self.scale


class TensorScale(Scaled):
    def change(self, x: Tensor) -> Tensor:
        return x * self.scale


class Chain(Scaled):
    """Each layer reads what the layer two before it made."""

    def change(self, x: Tensor) -> Tensor:
        KEPT[str(self.layer_idx)] = x
        return x + 0.1 * KEPT[str(self.layer_idx - 2)] if self.layer_idx > 1 else x


class Counter(Scaled):
    """Counts the layers of a pass, and uses the count."""

    def change(self, x: Tensor) -> Tensor:
        CALLS["layers"] = CALLS["layers"] % DEPTH + 1
        return x * (1.0 + 0.05 * CALLS["layers"])


class OwnCounter(Scaled):
    """Counts its own calls, and uses the count: another result in each pass."""

    def change(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x * (1.0 + 0.05 * self.calls)


class GlobalScale(Scaled):
    """Reads a global that the layer before it wrote."""

    def change(self, x: Tensor) -> Tensor:
        scale = SCALES["now"]
        SCALES["now"] = 1.5 if scale == 1.0 else (1.25 if scale == 1.5 else 1.0)
        return x * scale


class DeepFlag(Qwen3MLP):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * 2 if self.down_proj.special else out


def become(cls: type[nn.Module]) -> Callable[[PreTrainedModel], None]:
    def prepare(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            layer.__class__ = cls
            layer.layer_idx = layer.self_attn.layer_idx

    prepare.__name__ = cls.__name__
    return prepare


def with_attribute(cls: type[nn.Module], name: str, value: Callable[[int], Any]) -> Callable[[PreTrainedModel], None]:
    def prepare(model: PreTrainedModel) -> None:
        become(cls)(model)
        for index, layer in enumerate(model.model.layers):
            setattr(layer, name, value(index))

    prepare.__name__ = cls.__name__
    return prepare


def deep_flag(model: PreTrainedModel) -> None:
    for index, layer in enumerate(model.model.layers):
        layer.mlp.__class__ = DeepFlag
        layer.mlp.down_proj.special = index == FAR


def buffer_of_another_kind(model: PreTrainedModel) -> None:
    """A plain tensor a layer, neither parameter nor buffer."""
    become(TensorScale)(model)
    for index, layer in enumerate(model.model.layers):
        object.__setattr__(layer, "scale", torch.tensor(1.0 + 0.1 * index))


def hook(model: PreTrainedModel) -> None:
    model.model.layers[FAR].register_forward_hook(lambda module, args, output: output * 1.5)


def hook_inside(model: PreTrainedModel) -> None:
    model.model.layers[FAR].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hooks_everywhere(model: PreTrainedModel) -> None:
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, factor=1 + 0.1 * index: output * factor)


def shared_module(model: PreTrainedModel) -> None:
    model.model.layers[FAR].mlp = model.model.layers[2].mlp


def shared_weight(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[3].self_attn.q_proj.weight = layers[2].self_attn.q_proj.weight


def shared_weight_outside_the_template(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[7].mlp.up_proj.weight = layers[5].mlp.gate_proj.weight


def one_mlp_for_all(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp


def forward_of_one(model: PreTrainedModel) -> None:
    layer = model.model.layers[FAR]
    original = layer.forward
    object.__setattr__(layer, "forward", lambda *args, **kwargs: original(*args, **kwargs) * 1.5)


# -- models that run their stack in a way of their own ---------------------------------------------------------


class OtherOrder(Qwen3Model):
    """Runs its layers in the order of `order`."""

    def order(self) -> list[nn.Module]:
        """To be overridden."""
        return list(self.layers)

    def feed(self, before: list[Tensor]) -> Tensor:
        """What the next layer reads, of all that was there to read before each layer."""
        return before[-1]

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden.shape[1]).unsqueeze(0) + seen
        mask = attention_mask
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        elif mask is None or mask.dim() == 2:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        rope = self.rotary_emb(hidden, position_ids)
        seen_by: list[tuple[nn.Module, Tensor]] = []
        for layer in self.order():
            again = any(layer is done for done, _ in seen_by)
            seen_by.append((layer, hidden))
            hidden = layer(
                self.feed([value for _, value in seen_by]),
                attention_mask=None if again else mask,
                position_embeddings=rope,
                position_ids=position_ids,
                past_key_values=None if again else past_key_values,
                use_cache=use_cache,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class FarBack(OtherOrder):
    """Each layer also reads what the layer two before it read."""

    def feed(self, before: list[Tensor]) -> Tensor:
        return before[-1] + 0.1 * before[max(0, len(before) - 3)]


class FifthBack(OtherOrder):
    """Each layer also reads what the layer five before it read: the embedding, for all layers of a template."""

    def feed(self, before: list[Tensor]) -> Tensor:
        return before[-1] + 0.1 * before[max(0, len(before) - 6)]


class FirstLayer(OtherOrder):
    """Each layer also reads what the first layer made."""

    def feed(self, before: list[Tensor]) -> Tensor:
        return before[-1] + 0.1 * before[min(1, len(before) - 1)]


class Embedding(OtherOrder):
    """Each layer also reads the embedding, a value from before the stack."""

    def feed(self, before: list[Tensor]) -> Tensor:
        return before[-1] + 0.1 * before[0]


class Straight(OtherOrder):
    """The usual order: to see that the stand-in itself is stamped."""


class Backwards(OtherOrder):
    def order(self) -> list[nn.Module]:
        return list(self.layers)[::-1]


class Skipping(OtherOrder):
    def order(self) -> list[nn.Module]:
        return [layer for index, layer in enumerate(self.layers) if index != 2]


class SkippingDeep(OtherOrder):
    def order(self) -> list[nn.Module]:
        return [layer for index, layer in enumerate(self.layers) if index != FAR]


class EveryOther(OtherOrder):
    def order(self) -> list[nn.Module]:
        return list(self.layers)[::2]


class LastOnly(OtherOrder):
    """Only the first four and the last, whatever the depth."""

    def order(self) -> list[nn.Module]:
        return [*list(self.layers)[:4], list(self.layers)[-1]]


class ScaledByDepth(OtherOrder):
    """Scales with the number of its layers, as a loop over layers may."""

    def order(self) -> list[nn.Module]:
        self.scale = 1.0
        return list(self.layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * (1.0 + 0.1 * len(self.layers))
        return output


class Twice(OtherOrder):
    """All layers, and then all of them again, without a cache."""

    def order(self) -> list[nn.Module]:
        return [*self.layers, *self.layers]


def run_as(cls: type[nn.Module]) -> Callable[[PreTrainedModel], None]:
    def prepare(model: PreTrainedModel) -> None:
        model.model.__class__ = cls

    prepare.__name__ = cls.__name__
    return prepare


own_name = with_attribute(OwnName, "name", lambda index: f"model.layers.{index}")
own_name_in_dict = with_attribute(OwnNameInDict, "settings", lambda index: {"name": f"model.layers.{index}"})
float_scale = with_attribute(FloatScale, "scale", lambda index: 1.0 + 0.1 * index)
unread_name = with_attribute(Scaled, "name", lambda index: f"model.layers.{index}")

STAMPED = [
    unread_name,
    run_as(Straight),
    run_as(Embedding),
    one_mlp_for_all,
    shared_weight_outside_the_template,
    become(Scaled),
]
"""Nothing in these is wrong with stamping."""
FOOLS = [
    with_attribute(Flag, "special", lambda index: index == FAR),
    with_attribute(FlagInHelper, "special", lambda index: index == FAR),
    deep_flag,
    become(Modulo),
    become(Beyond),
    become(BeyondInHelper),
    become(Slightly),
    become(LookedUp),
    become(LookedUpElsewhere),
    own_name,
    own_name_in_dict,
    float_scale,
    become(Chain),
    become(Counter),
    with_attribute(OwnCounter, "calls", lambda index: 0),
    become(GlobalScale),
    hook,
    hook_inside,
    hooks_everywhere,
    shared_module,
    shared_weight,
    forward_of_one,
    run_as(Backwards),
    run_as(Skipping),
    run_as(SkippingDeep),
    run_as(EveryOther),
    run_as(LastOnly),
    run_as(ScaledByDepth),
    run_as(Twice),
    run_as(FarBack),
    run_as(FifthBack),
    run_as(FirstLayer),
    buffer_of_another_kind,
]
