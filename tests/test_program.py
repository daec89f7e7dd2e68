"""Programs as text: random plans run as if step by step, drop what is dead, and read as they run."""

from __future__ import annotations

import functools
import linecache
import random
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import glowplug
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.split import OpStep, Piece, Value
from glowplug.graph.stamp import Local, Outside, Own, Previous, Stamped, Unit, UnitStep
from glowplug.ops.layer_op import find_op_by_name, layer_op
from glowplug.program.plan import Plan
from glowplug.program.program import Program, piece_name
from glowplug.program.write import Run, fold, write_program


class Token:
    """A value; equal to another that was made in the same way.

    Args:
        made: how it was made.
    """

    def __init__(self, *made: Any) -> None:
        self.made = hash(made)


@layer_op("test_program::mix", fake=lambda x, factor, others, limit: (x, x), splitting=True)
def mix(layer: Any, x: torch.Tensor, factor: int, others: list[torch.Tensor], limit: float) -> torch.Tensor:
    return (
        Token("mix", layer.number, x.made, factor, *(other.made for other in others), limit),  # type: ignore[return-value,attr-defined]
        Token("unread"),
    )


class Model:
    """A random stamped model: a head, and layers of several kinds, each of a piece, an op and a piece.

    Args:
        random: chooses.
        sequence: the unit that runs each layer; the first and the last are of their own.
    """

    def __init__(self, random: random.Random, sequence: Sequence[int]) -> None:
        self.random, self.depth = random, len(sequence)
        self.stack = nn.Sequential(*(nn.Identity() for _ in sequence))
        self.registry = glowplug.register_layers(self.stack)
        for number, layer in enumerate(self.stack):
            layer.number = number
        self.values = {"w": Token("w"), "scale": Token("scale")}
        self.weights = [Token("weight", layer % 5) for layer in range(self.depth + 1)]
        self.slots: dict[Fingerprint, Callable[..., Any]] = {}
        head = Piece(None, ("ids", "mask", "w"), ("hidden", "cos", "mask_2"))
        units = [self.unit(first=number == 0) for number in range(max(sequence) + 1)]
        outputs = (Local(2, 0), Outside("cos"))
        stamped = Stamped((head,), tuple(units), tuple(sequence), outputs)
        found = self.slot("head", 3)
        arguments = {"ids": "L['ids']", "mask": "L['mask']"}
        self.plan = Plan((head,), (found,), (), arguments, stamped, ())

    def slot(self, name: str, outputs: int) -> Fingerprint:
        """A piece."""
        found = Fingerprint(name)
        self.slots[found] = lambda *args: tuple(Token(name, at, *(a.made for a in args)) for at in range(outputs))
        return found

    def bind(self, layer: int, own: Own) -> Any:
        """What a layer has at a path."""
        if own.path == "handle":
            return self.registry.handles[str(layer)]
        return self.weights[layer + own.offset]

    def unit(self, *, first: bool) -> Unit:
        """The unit of a kind; the first reads nothing of a layer before."""
        steps: list[UnitStep] = []
        for place, count in enumerate((2, 2, 3)):
            places = [(step, slot) for step, slots in enumerate((2, 1, 3)) for slot in range(slots)]
            before: list[Any] = [Local(step, slot) for step, slot in places if step < place]
            before += [Outside(name) for name in ("hidden", "cos", "mask", "mask_2", "scale")]
            before += [] if first else [Previous(step, slot) for step, slot in places] * 2
            read = self.random.sample(before, k=self.random.randint(2, 4))
            inputs = {ref.name if isinstance(ref, Outside) else f"x{n}": ref for n, ref in enumerate(read)}
            if place == 1:
                x, *others = [name for name, ref in inputs.items() if ref != Outside("scale")] or ["cos"]
                inputs = {"h": Own(0, "handle"), x: inputs.get(x, Outside("cos")), **{o: inputs[o] for o in others}}
                args = (Value("h"), Value(x), 2, [Value(name) for name in others], float("inf"))
                op = find_op_by_name("test_program::mix")
                assert op is not None
                step = OpStep(op, op.overloads["hoisted"], args, ("mixed", None), False)
                steps.append(UnitStep(step, None, inputs, ""))
                continue
            inputs = {**inputs, "a_weight": Own(self.random.randint(0, 1), "weight")}
            names = tuple(f"out{place}_{number}" for number in range(count))
            found = self.slot(f"piece {self.random.randint(0, 2)} of {count}", count)
            steps.append(UnitStep(Piece(None, tuple(inputs), names), found, inputs, ""))
        return Unit(tuple(steps))

    def program(self) -> Program:
        """The program."""
        return write_program(
            self.plan.deep, self.plan.returned, self.plan.arguments, self.slots, self.values, self.bind
        )

    def expected(self, ids: Token, mask: Token) -> tuple[list[int], list[set[Any]]]:
        """What it returns, step by step; and for each step, the values of layers that it or a later step reads."""
        values: dict[Any, Any] = {"ids": ids, "mask": mask}
        deep, last = self.plan.deep, dict[Any, int]()
        for index, step in enumerate(deep):
            fetched = {n: values[s] if s in values else self.fixed(step.layer, s) for n, s in step.inputs.items()}
            if isinstance(step.step, OpStep):
                layer = self.registry[str(step.layer)]
                _, x, factor, others, limit = step.step.args
                result = mix(layer, fetched[x.name], factor, [fetched[o.name] for o in others], limit)
            else:
                assert step.slot is not None
                result = self.slots[step.slot](*fetched.values())
            values |= {key: value for key, value in zip(step.outputs, result, strict=True) if key is not None}
            last |= dict.fromkeys([s for s in step.inputs.values() if isinstance(s, tuple)], index)
        returned = [(self.depth - 1, 2, 0), "cos"]
        last[returned[0]] = len(deep)
        made: set[Any] = set()
        needed = []
        for index, step in enumerate(deep):
            needed.append({key for key in made if last[key] >= index})
            made |= {key for key in step.outputs if isinstance(key, tuple) and key in last}
        return [values[key].made for key in returned], needed

    def fixed(self, layer: int | None, source: Any) -> Any:
        """A bound object."""
        if isinstance(source, Own):
            assert layer is not None
            return self.bind(layer, source)
        return self.values[source]


SEQUENCES = [
    [0, *[1] * 40, 2],
    [0, 1, 1, *[2, 3] * 9, 4],
    [0, *[1, 2, 2, 3] * 4, 5],
    [0, 1, 1, 2],
    [0, *[1] * 5, *[2] * 5, *[1] * 4, 3],
]


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    model = Model(random.Random(seed), SEQUENCES[seed % len(SEQUENCES)])
    ids, mask = Token("ids"), Token("mask")
    expected, needed = model.expected(ids, mask)
    alive: weakref.WeakSet[Token] = weakref.WeakSet()
    most: list[int] = []

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            most.append(len(alive))
            result = run(*args)
            if len(most) > 1:  # what the head gave may live on, to the end of a loop
                alive.update(result)
            return result

        return call

    program = model.program()
    ops = {name: watched(v) for name, v in program.names.items() if name == "mix"}
    text: dict[str, Any] = {**program.names, **ops}
    exec(program.source, text)
    actual = text["run"](tuple(map(watched, program.slots.values())), ids, mask)
    assert [token.made for token in actual] == expected
    assert [count <= len(keys) for count, keys in zip(most, needed, strict=True)] == [True] * len(needed)
    assert [token.made for token in program.run(ids, mask)] == expected
    folded = [run for run in fold(SEQUENCES[seed % len(SEQUENCES)]) if run.times > 3]
    assert program.source.count("    for ") >= len(folded)


def test_the_listing_runs_and_slots_can_be_replaced() -> None:
    model = Model(random.Random(3), SEQUENCES[1])
    program = model.program()
    ids, mask = Token("ids"), Token("mask")
    expected = [token.made for token in program.run(ids, mask)]
    names = dict(program.names)
    exec(program.listing(), names)
    assert [token.made for token in names["run"](tuple(program.slots.values()), ids, mask)] == expected
    head = next(iter(program.slots))
    other = program.with_slots({head: lambda *args: (Token("else"),) * 3, Fingerprint("unknown"): print})
    assert list(other.slots) == list(program.slots) and other.code is program.code
    assert [token.made for token in other.run(ids, mask)] != expected
    assert [token.made for token in program.run(ids, mask)] == expected
    for number, slot in enumerate(program.slots):
        assert f"# {piece_name(number)}: piece {slot.digest}" in program.listing()


def test_a_traceback_shows_the_text_while_the_program_lives() -> None:
    program = Model(random.Random(0), SEQUENCES[3]).program()
    head = next(iter(program.slots))
    broken = program.with_slots({head: lambda *args: 1 / 0})
    with pytest.raises(ZeroDivisionError) as raised:
        broken.run(Token(), Token())
    assert "piece_a(ids, mask, *WEIGHTS)" in "".join(traceback.format_tb(raised.value.__traceback__))
    filename = program.code.__code__.co_filename
    assert filename in linecache.cache
    del raised, broken, program
    assert filename not in linecache.cache


def full(steps: Sequence[Any], outputs: Sequence[str], arguments: Sequence[str], **values: Any) -> Program:
    """A full trace; each piece adds up what it is given and returns that for each output."""
    prints = [Fingerprint(f"{n}") if isinstance(step, Piece) else None for n, step in enumerate(steps)]
    slots = {
        found: functools.partial(lambda count, *args: (sum(args),) * count, len(step.outputs))
        for found, step in zip(prints, steps, strict=True)
        if found is not None
    }
    plan = Plan(tuple(steps), tuple(prints), tuple(outputs), {a: f"L['{a}']" for a in arguments}, None, ())
    return plan.write(slots, values)


def test_names_do_not_clash() -> None:
    names = ("slots", "piece_a", "run", "for", "l_x_", "x", "_", "WEIGHTS", "a.b", "value")
    program = full([Piece(None, (*names, "w"), ("piece_b", "class"))], ("class", "w", "piece_b"), names, w=100)
    assert program.run(*range(10)) == (145, 100, 145)
    assert "piece_a" in program.source.splitlines()[1]


def test_bound_objects_keep_their_place() -> None:
    """Among the arguments of a piece, and those that are equal, but not the same."""
    steps = [Piece(None, ("v", "x", "w"), ("y",)), Piece(None, ("y", "u"), ("z",))]
    program = full(steps, ("z",), ("x",), v=1.0, w=10.0, u=float("1"))
    seen: list[Any] = []
    first, second = program.slots
    note = program.with_slots({first: lambda *args: seen.append(args) or (5,), second: lambda *args: (args,)})  # type: ignore[func-returns-value]
    assert note.run(7) == ((5, 1.0),)
    assert seen == [(1.0, 7, 10.0)]


def test_a_piece_whose_outputs_nobody_reads_runs() -> None:
    calls: list[Any] = []
    program = full([Piece(None, ("x",), ()), Piece(None, ("x",), ("unread",))], ("x",), ("x",))
    first, second = program.slots
    assert program.with_slots({first: calls.append, second: calls.append}).run(3) == (3,)
    assert calls == [3, 3]


def test_folding() -> None:
    assert fold([0, 1, 2, 1, 2, 1, 2, 3]) == [Run(0, 1, 1), Run(1, 2, 3), Run(7, 1, 1)]
    assert fold([0, 1, 1]) == [Run(0, 1, 1), Run(1, 1, 1), Run(2, 1, 1)]
    for sequence in ([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4], [0] + [1] * 40 + [2], [5, 4, 5, 4, 5, 4, 1]):
        runs = fold(sequence)
        flat = [s for run in runs for s in sequence[run.start : run.start + run.period] * run.times]
        assert flat == sequence
