"""Compares a stamped program with the decoder's own forward on a few distinct tokens, in vLLM's profiling run.

In that run attention returns zeros, so that weights before and after it would not count. So each splitting op is
watched: both must call the same ops with the same layer names and equal inputs, in the same order; and instead of what
the op returned, both go on with the same noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from glowplug.errors import NotServableError
from glowplug.frontends.vllm.calls import DecoderCall, readers
from glowplug.frontends.vllm.pieces import SplittingOps
from glowplug.frontends.vllm.private import vllm
from glowplug.frontends.vllm.stamped import Stamped
from glowplug.program import Program
from glowplug.verify.check import Agree, Case, why_wrong
from glowplug.verify.closeness import EXACT, difference

_TOKENS = 16
_STRIDE = 7
"""Distance of their ids and positions, where the vocabulary and the longest sequence allow it."""


@dataclass(eq=False)
class _Calls(TorchDispatchMode):
    """Records the calls of splitting ops, or compares them with those of an earlier run.

    Attributes:
        ops: the splitting ops.
        expected: what the earlier run recorded.
        seen: what this run recorded.
        problem: how it differs, in words.
    """

    ops: SplittingOps
    expected: Sequence[tuple[str, Any]] | None = None
    seen: list[tuple[str, Any]] = field(default_factory=list)
    problem: str | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if not self.ops.has(func):
            return func(*args, **(kwargs or {}))
        number = len(self.seen)
        given = list(pytree.tree_leaves((args, kwargs or {})))
        names = [_name(value) for value in given]
        call = f"{func.name()} of {', '.join(name for name in names if name) or 'no layer'}"
        tensors = [value.detach().clone() for value in _passed(func, args, kwargs or {}, written=False)]
        self.seen.append((call, tensors if self.expected is None else ()))
        if self.expected is not None and self.problem is None:
            self.problem = self._differs(number, call, tensors)
        returned = func(*args, **(kwargs or {}))
        for position, tensor in enumerate([*_passed(func, args, kwargs or {}, written=True), *_tensors(returned)]):
            _fill(tensor, 1000 * number + position)
        return returned

    def _differs(self, number: int, call: str, tensors: list[Tensor]) -> str | None:
        assert self.expected is not None
        if number >= len(self.expected):
            return f"it calls {call}, and the decoder calls no more ops"
        wanted, inputs = self.expected[number]
        if wanted != call:
            return f"it calls {call} where the decoder calls {wanted}"
        return difference(tensors, inputs, EXACT, f"what {call} gets")


def _name(value: Any) -> str | None:
    """The name of the layer that an argument of an op stands for."""
    real = getattr(value, "real_obj", value)
    if isinstance(real, vllm().LayerName):
        return str(real.value)
    return value if isinstance(value, str) else None


def _passed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, written: bool) -> list[Tensor]:
    """The tensors that a call passes to an op: those that the op writes to, or the others."""
    tensors: list[Tensor] = []
    for position, declared in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(declared.name)
        if declared.is_write == written:
            tensors += _tensors(value)
    return tensors


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _fill(tensor: Tensor, seed: int) -> None:
    """Fill a floating point tensor with noise."""
    if tensor.is_floating_point() and tensor.numel():
        generator = torch.Generator(tensor.device).manual_seed(seed)
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
        tensor.copy_(noise)


@dataclass(frozen=True)
class OwnForward:
    """What a decoder's own forward does on a few distinct tokens.

    Attributes:
        call: the call with these tokens.
        seen: the calls of splitting ops.
        output: what it returned.
    """

    call: DecoderCall
    seen: Sequence[tuple[str, Any]]
    output: Any

    @classmethod
    def of(cls, decoder: Any, call: DecoderCall, ops: SplittingOps) -> OwnForward:
        """Run it, on the first tokens of a call."""
        tokens = min(_TOKENS, call.tokens)
        model = decoder.vllm_config.model_config
        limit = min(model.max_model_len, getattr(model.hf_text_config, "vocab_size", model.max_model_len))
        short = call.distinct(tokens, max(1, min(_STRIDE, limit // tokens)))
        calls = _Calls(ops)
        with torch.no_grad(), _context_of(tokens, call.tokens), calls, _unchanged(decoder):
            output = type(decoder).forward(decoder, **short.arguments())
        return cls(short, calls.seen, output)


def compare(
    decoder: Any, own: OwnForward, tokens: int, ops: SplittingOps, stamped: Stamped, agree: Agree | None
) -> tuple[str | None, Any]:
    """Compare a stamped program with the decoder's own forward.

    Args:
        decoder: the decoder.
        own: what its own forward did.
        tokens: the number of tokens of the call that the program is to serve.
        ops: the splitting ops.
        stamped: the program.
        agree: makes the finding of one rank that of all, of a decoder that several ranks run together.

    Returns:
        Why the program must not serve, or None; and the structure of what the decoder returns, None for one tensor.
    """
    short = own.call
    expected, form = pytree.tree_flatten(own.output)
    with torch.no_grad(), _context_of(short.tokens, tokens):
        graphs = stamped.graphs()
        program = stamped.write(decoder)
        program = program.with_slots(
            {slot: _filled(run, stamped.allocated[slot]) for slot, run in stamped.slots.items()}
        )
        uncompiled = None
        if graphs is not None:  # a splitting op must run once
            pieces = {slot: _filled(run, stamped.allocated[slot]) for slot, run in graphs.items()}
            uncompiled = program.with_slots({slot: run for slot, run in pieces.items() if slot not in stamped.ops})
        if agree is not None and uncompiled is not None:
            # Ranks run collectives together, so that none may run a piece more often than the others.
            program = uncompiled
        read = readers(program.arguments, decoder)

        def run(candidate: Program) -> Any:
            calls = _Calls(ops, own.seen)
            with calls:
                outputs = list(candidate.run(*[reader(short.tensors) for reader in read]))
            if calls.problem is None and len(calls.seen) != len(own.seen):
                calls.problem = f"it calls {len(calls.seen)} ops, and the decoder calls {len(own.seen)}"
            if calls.problem is not None:
                raise NotServableError(calls.problem)
            return outputs

        reason = None if own.seen else "its own forward calls no splitting op"
        if reason is None:
            cases = [Case(f"{short.tokens} tokens", expected, run)]
            reason = why_wrong(program, uncompiled, cases, agree, once=True)
    return reason, None if isinstance(own.output, Tensor) else form


def _filled(run: Callable[..., Any], outputs: Sequence[int]) -> Callable[..., Any]:
    """A piece that fills with zeros what it returns without content."""
    if not outputs:
        return run

    def filled(*args: Any) -> Any:
        returned = run(*args)
        for at in outputs:
            returned[at].zero_()
        return returned

    return filled


@contextlib.contextmanager
def _unchanged(decoder: nn.Module) -> Iterator[None]:
    """Give the decoder's modules back what they held: an uncompiled forward may replace a buffer by one of another
    dtype, and compiled code would read it wrongly."""
    tables = [table for m in decoder.modules() for table in (m._parameters, m._buffers, m.__dict__)]
    held = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, before in held:
            table.update(before)


@contextlib.contextmanager
def _context_of(tokens: int, before: int) -> Iterator[None]:
    """vLLM's forward context for the first tokens of a dummy batch: what it holds for each token is shortened, and
    attention has nothing to attend to, so that no run touches the cache."""
    if not vllm().is_forward_context_available():
        yield
        return
    context = vllm().get_forward_context()
    kept = dict(vars(context))
    try:
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == before:
                setattr(context, name, value[:tokens])
        context.attn_metadata = None
        context.slot_mapping = {}
        yield
    finally:
        vars(context).update(kept)
