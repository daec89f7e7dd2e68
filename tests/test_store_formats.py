"""What lies in a store, as bytes: envelopes, the keys that sign them, and records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Mod, PowByNatural

from glowplug.errors import ArtifactError, NotStorableError, UnsignedArtifactError, UsageError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.shapes import ShapeAssumptions
from glowplug.graph.split import OpStep, Piece, Value
from glowplug.graph.stamp import Local, Outside, Own, Previous, Stamped, Unit, UnitStep
from glowplug.ops.layer_op import find_op_by_name
from glowplug.program import Plan
from glowplug.program.program import StepOutline
from glowplug.store import ArtifactStore, SigningKey
from glowplug.store.codec import codec
from glowplug.store.envelope import MAGIC, pack, read_header, unpack
from glowplug.store.record import Place, Record
from glowplug.store.sizes import read_size, write_size

KEY = "ab" + "c" * 62
OTHER = "ef" + "0" * 62
SECRET = SigningKey(b"sixteen bytes are enough")


def envelope(**changes: Any) -> bytes:
    """An envelope whose header says something else."""
    content = pack("piece", KEY, b"payload", SECRET)
    header, start = read_header(content)
    return MAGIC + json.dumps({**vars(header), **changes}).encode() + b"\n" + content[start:]


# -- envelopes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"x", b"\n" * 99, bytes(range(256)) * 999])
@pytest.mark.parametrize("signing_key", [None, SECRET])
def test_payload_survives(payload: bytes, signing_key: SigningKey | None) -> None:
    assert (
        unpack(pack("piece", KEY, payload, signing_key, about="\U0001f600" * 500), "piece", KEY, signing_key) == payload
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "manifest"},
        {"key": OTHER},
        {"key": "../../../etc/passwd"},
        {"size": 6},
        {"size": float("nan")},
        {"size": float("inf")},
        {"size": 10**400},
        {"size": True},
        {"size": "7"},
        {"made": 10**400},
        {"made": None},
        {"sha256": "é" * 64},
        {"sha256": "\ud800"},
        {"sha256": 0},
        {"about": ["x"]},
        {"unknown": 1},
    ],
)
def test_wrong_headers_are_noticed(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        unpack(envelope(**changes), "piece", KEY, None)


@pytest.mark.parametrize("letter", ["\ud800", "\x1b[2J", "\x00"])
def test_what_an_artifact_says_does_not_reach_the_log_raw(
    letter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A hostile header must not steer a terminal, nor break a log that is written as UTF-8."""
    store = ArtifactStore(tmp_path)
    store.put("piece", KEY, b"payload")
    (entry,) = store.local.entries()
    entry.path.write_bytes(envelope(**{f"x{letter}": 1}))
    assert store.get("piece", KEY) is None
    (problem,) = store.problems
    assert "is not used" in problem and "?" in problem
    assert problem.isprintable() and problem in caplog.text
    caplog.text.encode()


@pytest.mark.parametrize("signature", ["", "0" * 64, "é", "\ud800", "x" * 2000])
def test_wrong_signatures_are_refused(signature: str) -> None:
    assert unpack(envelope(signature=signature), "piece", KEY, None) == b"payload"
    with pytest.raises(UnsignedArtifactError):
        unpack(envelope(signature=signature), "piece", KEY, SECRET)


@pytest.mark.parametrize("changes", [{"made": 0.5}, {"about": "other"}])
def test_the_signature_covers_the_header(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsignedArtifactError):
        unpack(envelope(**changes), "piece", KEY, SECRET)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        MAGIC,
        MAGIC[:-1],
        MAGIC.replace(b"2", b"0") + b"{}\n",
        MAGIC + b"[" * 4000 + b"\n",
        MAGIC + b"{}" + b" " * 9000 + b"\n",
        MAGIC + b"null\n",
        MAGIC + b"\xff\xfe\n",
        MAGIC + b'{"kind": ' + b"9" * 4000 + b"}\n",
    ],
)
def test_what_is_no_envelope(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_header(content)


# -- keys --------------------------------------------------------------------------------------------------


def test_signing_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_bytes(SECRET.secret + b"\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others can read"):
        SigningKey.from_file(file)
    file.chmod(0o600)
    assert SigningKey.from_file(file) == SECRET
    assert "sixteen" not in repr(SECRET)
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="can't read the signing key"):
            SigningKey.from_file(wrong)
    with pytest.raises(UsageError, match="at least 16"):
        SigningKey(b"short")
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY_FILE", str(file))
    assert SigningKey.from_environment() == SECRET
    monkeypatch.setenv("GLOWPLUG_SIGNING_KEY", "x" * 16)
    with pytest.raises(UsageError, match="both set"):
        SigningKey.from_environment()


# -- sizes -------------------------------------------------------------------------------------------------

S0, U1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "u1"))
SIZES = [
    S0,
    sympy.Eq(Mod(S0, 8), 0),
    sympy.Le(2 * S0 + 1, U1),
    (S0 < 4) & (U1 >= 2),
    sympy.Ne(S0**2 - 1, FloorDiv(U1, 2)),
    sympy.Not(sympy.Or(S0 > 3, U1 > 3)),
    S0 / 2 > 0.5,
    Max(S0, PowByNatural(U1, 2)),
    sympy.true,
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_relations_of_sizes_are_read(size: Any) -> None:
    assert read_size(json.loads(json.dumps(write_size(size)))) == size


@pytest.mark.parametrize("size", [sympy.Symbol("x"), sympy.Symbol("s0"), sympy.sin(S0), sympy.oo, sympy.nan], ids=str)
def test_relations_that_can_not_be_read_are_not_written(size: Any) -> None:
    with pytest.raises(NotStorableError):
        write_size(size)


@pytest.mark.parametrize(
    "tree",
    [
        "__import__('os')",
        "s0.__class__",
        "text",
        "",
        None,
        {},
        ["eval", "s0"],
        ["__class__"],
        ["Pow", 9, ["Pow", 9, 9]],
        ["Pow", "s0", 10**9],
        ["Pow", ["Mul", 9, ["Pow", ["Mul", 9, "s0"], 16]], 16],
        ["LShift", 1, 10**12],
        ["PowByNatural", 9, 10**9],
    ],
    ids=str,
)
def test_relations_run_no_code(tree: Any) -> None:
    with pytest.raises(ArtifactError):
        read_size(tree)


# -- records -----------------------------------------------------------------------------------------------


def make_record() -> Record:
    """A record that has one of everything."""
    op = find_op_by_name("glowplug::moe_forward")
    assert op is not None
    first, second = Fingerprint("1" * 64), Fingerprint("2" * 64)
    piece = Piece(torch.fx.symbolic_trace(torch.nn.Identity()), ("x", "w"), ("y",), 3)
    args = (Value("h"), 1, 2.5, float("inf"), None, True, "text", [Value("y"), 3], (4,), torch.float32)
    call = OpStep(op, op.overloads["hoisted"], (*args, torch.device("cuda", 1)), ("z", None), False)
    inputs = {"y": Local(0, 1), "x": Previous(2, 3), "w": Own(1, "mlp.weight"), "g": Outside("g")}
    unit = Unit((UnitStep(piece, second, inputs, ""), UnitStep(call, None, {}, "constants")))
    return Record(
        plan=Plan(
            (piece, call),
            (first, None),
            ("y",),
            {"z": "L['inputs']", "a": "L['keep']"},
            Stamped((piece, call), (unit,), (0, 0, 0), (Previous(0, 0),)),
            (StepOutline(None, first, ("w",)), StepOutline(op.name, None, ())),
        ),
        places={"w": Place("model.weight"), "h": Place("model.layers.0", is_handle=True), "n": None},
        stack="model.layers",
        handles=frozenset({"mlp", "attention"}),
        assumptions=ShapeAssumptions({"L['inputs']": (S0, 1, 2 * S0)}, (sympy.Eq(Mod(S0, 8), 0),)),
        reads=("L['self'].training",),
        globals={"G['x']": "2.0"},
        sources={"module": "0" * 64},
        addresses={"1" * 64: "address"},
        facts={"slots": {"op": [((None, 4), torch.int64)]}, "layers": 4},
        verified=False,
    )


def test_records_survive() -> None:
    record = make_record()
    found = Record.from_bytes(record.to_bytes())
    (piece, call), wanted = found.plan.steps, record.plan.steps[1]
    assert (piece.gm, piece.inputs, piece.outputs, piece.layer) == (None, ("x", "w"), ("y",), 3)
    assert call == wanted and isinstance(call, OpStep) and isinstance(wanted, OpStep)
    assert (call.overload is wanted.overload, call.args) == (True, wanted.args)
    assert list(found.plan.arguments) == ["z", "a"]
    assert found.pieces() == {Fingerprint("1" * 64): "address", Fingerprint("2" * 64): "2" * 64}
    assert found.plan.stamped is not None and record.plan.stamped is not None
    assert found.plan.stamped.units[0].wiring == record.plan.stamped.units[0].wiring
    assert (found.plan.outline, found.facts) == (record.plan.outline, record.facts)
    for name in ("places", "stack", "handles", "assumptions", "reads", "globals", "sources", "verified"):
        assert getattr(found, name) == getattr(record, name)
    assert Record.from_bytes(found.to_bytes()) == found


@pytest.mark.parametrize(
    "change",
    [
        {"plan": Plan((), (Fingerprint("1" * 64, stable=False),), (), {}, None, ())},
        {"facts": {"odd": object()}},
        {"facts": {"odd": torch.nn.Linear(1, 1)}},
        {"assumptions": ShapeAssumptions({"x": (sympy.Symbol("s0"),)}, ())},
    ],
    ids=["unstable piece", "object", "module", "symbol"],
)
def test_what_a_record_can_not_hold(change: dict[str, Any]) -> None:
    with pytest.raises(NotStorableError):
        replace(make_record(), **change).to_bytes()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100000, b'{"schema": 2}', b'{"schema": 99}', b"\xff", b"null"])
def test_what_is_no_record(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        Record.from_bytes(content)


WRONG = [None, 1, 1.5, "text", [], {}, [1], {"x": 1}, {"Own": {}}, {"dtype": "load"}, {"overload": "aten.add.Tensor"}]


def test_hostile_records_are_refused_or_are_records() -> None:
    """Whatever stands in the place of a part, what is read has the types that a record has, and is written again."""
    content, refused = json.loads(make_record().to_bytes()), 0
    parts = list(_parts(content))
    for holder, key in parts:
        before = holder[key]
        for wrong in WRONG:
            holder[key] = wrong
            try:
                Record.from_bytes(json.dumps(content).encode()).to_bytes()
            except ArtifactError:
                refused += 1
        holder[key] = before
    assert refused > 0.7 * len(parts) * len(WRONG)


def _parts(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value, by what holds it."""
    for key in list(body) if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ():
        yield body, key
        yield from _parts(body[key])


@pytest.mark.parametrize("name", ["load", "Tensor", "no dtype"])
def test_dtypes_by_name(name: str) -> None:
    write, read = codec(Any)
    assert read(write(torch.bfloat16)) is torch.bfloat16
    with pytest.raises((ArtifactError, AttributeError)):
        read({"dtype": name})
