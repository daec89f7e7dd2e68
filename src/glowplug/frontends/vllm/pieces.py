"""Compiles the pieces of a decoder: by vLLM's own backend with its passes, ranges and sizes, or on a CPU, where vLLM
hands the whole graph to Inductor, by Inductor with vLLM's options."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from glowplug.compilers.base import StoringCompiler
from glowplug.compilers.environment import describe_environment
from glowplug.compilers.gpu.forks import GpuForks
from glowplug.compilers.inductor import InductorCompiler
from glowplug.frontends.vllm.private import vllm
from glowplug.graph.pickled import graph_from_bytes, graph_to_bytes
from glowplug.program.piece_store import Run


@dataclass(frozen=True)
class SplittingOps:
    """The ops at which vLLM cuts graphs: attention, and others that must not be in a CUDA graph.

    Attributes:
        names: qualified names, such as `vllm::unified_attention_with_output`.
    """

    names: frozenset[str]

    @classmethod
    def of(cls, config: Any) -> SplittingOps:
        """The splitting ops of a configuration; where it has none, those that vLLM would choose."""
        listed = config.splitting_ops or vllm().CompilationConfig._attention_ops
        return cls(frozenset(listed) | {"vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"})

    def has(self, target: Any) -> bool:
        """Whether an op, or one of its overloads, is one of them."""
        name = getattr(target, "_qualified_op_name", None)
        if name is None and isinstance(target, torch._ops.OpOverload):
            name = target.name()
        return name is not None and (name in self.names or name.split(".")[0] in self.names)

    def cuts(self, node: fx.Node) -> bool:
        """Whether a node calls one of them."""
        return node.op == "call_function" and self.has(node.target)

    def is_in(self, gm: fx.GraphModule) -> bool:
        """Whether a piece is such a call."""
        return any(map(self.cuts, gm.graph.nodes))


class DecoderCompiler:
    """Compiles pieces with another compiler, and runs splitting ops as they are.

    Args:
        inner: compiles what lies between splitting ops.
        ops: the splitting ops.

    Attributes:
        forked: whether pieces were compiled in forks, at once.
    """

    drops_guards = True
    """vLLM runs compiled code for every size, whatever its compilation assumed."""

    def __init__(self, inner: StoringCompiler, ops: SplittingOps) -> None:
        self.inner = inner
        self.ops = ops
        self.name = inner.name
        self.forked = False

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Run:
        """See `PieceCompiler.compile`."""
        if self.ops.is_in(piece):
            return piece.forward
        return self.inner.compile(piece, inputs)

    def environment(self, device: torch.device) -> str:
        """See `StoringCompiler.environment`."""
        return self.inner.environment(device)

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """See `StoringCompiler.forks`."""
        self.forked = self.inner.forks(inputs, several=several)
        return self.forked

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """See `StoringCompiler.compile_to_bytes`."""
        if self.ops.is_in(piece):
            return pickle.dumps((True, graph_to_bytes(piece)))
        return pickle.dumps((False, self.inner.compile_to_bytes(piece, inputs)))

    def compile_and_store(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Run, bytes]:
        """See `StoringCompiler.compile_and_store`."""
        if self.ops.is_in(piece):
            return piece.forward, pickle.dumps((True, graph_to_bytes(piece)))
        run, artifact = self.inner.compile_and_store(piece, inputs)
        return run, pickle.dumps((False, artifact))

    def load(self, artifact: bytes) -> Run:
        """See `StoringCompiler.load`."""
        is_op, content = pickle.loads(artifact)
        return graph_from_bytes(content) if is_op else self.inner.load(content)


class PiecewiseCompiler:
    """vLLM's own backend for pieces: its passes, compile ranges and sizes.

    Args:
        config: vLLM's configuration.
        prefix: the decoder's prefix in vLLM's logs.
    """

    name = "vllm"

    def __init__(self, config: Any, prefix: str) -> None:
        self.config = config
        self.folder = tempfile.TemporaryDirectory(prefix="glowplug-")
        self.backend = config.compilation_config.init_backend(config, prefix=prefix)
        with _storable():
            self.backend.configure_post_pass()
            self.backend.compiler_manager.initialize_cache(self.folder.name, True, prefix)
        # Forks can't run kernels. They are tuned when they first run, on the whole dummy batch; and what Inductor
        # may combine is combined without a benchmark, after which it combines all that run for less than 0.3 ms.
        self.backend.inductor_config["triton.autotune_at_compile_time"] = False
        self.backend.inductor_config["benchmark_combo_kernel"] = False
        self._forks = GpuForks()

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Run:
        """See `PieceCompiler.compile`."""
        return self._compile(piece).run

    def _compile(self, piece: fx.GraphModule) -> _Ranges:
        sizes = [n.meta["example_value"] for n in piece.graph.nodes if n.op == "placeholder"]
        place = next(
            ((at, dim) for at, value in enumerate(sizes) for dim in _symbolic_dims(value)),
            None,
        )
        with _storable():
            # Index 1 of 3: neither the first nor the last, which log and end what vLLM compiles as a whole.
            inner = vllm().PiecewiseBackend(piece, self.config, 1, 3, [], self.backend, True, submod_name="piece")
        return _Ranges(inner, place)

    def environment(self, device: torch.device) -> str:
        """See `StoringCompiler.environment`."""
        own = self.backend.compiler_manager.compute_hash(self.config)
        return repr([describe_environment(device, {}, 0), own, *vllm_facts(self.config)])

    def forks(self, inputs: Sequence[Sequence[Any]], *, several: bool = False) -> bool:
        """See `StoringCompiler.forks`."""
        return self._forks.load()

    def compile_to_bytes(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> bytes:
        """See `StoringCompiler.compile_to_bytes`."""
        if self._forks.enter():
            self._forks.begin(())
        return self.compile_and_store(piece, inputs)[1]

    def compile_and_store(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Run, bytes]:
        """See `StoringCompiler.compile_and_store`."""
        ranges = self._compile(piece)
        with _storable():
            parts = ranges.inner.to_bytes()
        if len(parts) < len(ranges.inner.range_entries):
            raise RuntimeError("vLLM compiled a piece into a form that can't be stored")
        return ranges.run, pickle.dumps((ranges.place, parts))

    def load(self, artifact: bytes) -> Run:
        """See `StoringCompiler.load`."""
        from torch._inductor.standalone_compile import AOTCompiledArtifact

        place, parts = pickle.loads(artifact)
        runs = {key: AOTCompiledArtifact.deserialize(pickle.loads(content)) for key, content in parts.items()}
        inner = vllm().PiecewiseBackend(None, self.config, 1, 3, [], self.backend, True, compiled_runnables=runs)
        return _Ranges(inner, place).run


@dataclass(frozen=True)
class _Ranges:
    """A piece compiled by vLLM for one or more ranges of sizes.

    Attributes:
        inner: vLLM's backend for the piece.
        place: (index of an input, dim) whose size chooses the range; None if no input varies.
    """

    inner: Any
    place: tuple[int, int] | None

    @property
    def run(self) -> Run:
        """The compiled code; it chooses by size if there is more than one range."""
        entries = list(self.inner.range_entries.values())
        if len(entries) == 1 or self.place is None:
            only: Run = entries[0].runnable
            return only
        number, dim = self.place
        choose = self.inner._find_range_for_shape

        def run(*args: Any) -> Any:
            return choose(args[number].shape[dim]).runnable(*args)

        return run


def _symbolic_dims(value: Any) -> Iterator[int]:
    """The dims of a tensor whose size is a plain symbol, and so the number of tokens."""
    for dim, size in enumerate(value.shape) if isinstance(value, torch.Tensor) else ():
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            yield dim


_STORABLE = "VLLM_USE_MEGA_AOT_ARTIFACT"
"""The environment variable of vLLM by which it compiles into a form that can be stored."""


@contextlib.contextmanager
def _storable() -> Iterator[None]:
    """Make vLLM compile pieces into a form that can be stored. It is set where vLLM reads it, as vLLM's workers read
    their environment only once."""
    held: dict[str, Any] = vars(vllm().envs)
    before = {name: held[name] for name in (_STORABLE,) if name in held}
    held[_STORABLE] = True
    try:
        yield
    finally:
        del held[_STORABLE]
        held.update(before)


def get_compiler(config: Any, prefix: str, ops: SplittingOps) -> DecoderCompiler:
    """The compiler for a decoder."""
    compilation = config.compilation_config
    inner: StoringCompiler
    if compilation.mode == vllm().CompilationMode.VLLM_COMPILE:
        inner = PiecewiseCompiler(config, prefix)
    else:
        vllm()._apply_constrain_to_fx_strides_patch()
        inner = InductorCompiler(compilation.inductor_compile_config, merges=False)
    return DecoderCompiler(inner, ops)


def vllm_facts(config: Any) -> list[str]:
    """What vLLM itself makes its compiled artifacts depend on: versions, its configuration, its environment."""
    return [vllm().version, torch.__version__, *map(str, vllm().aot_compile_hash_factors(config))]


_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "getitem")


def uninitialised(gm: fx.GraphModule) -> tuple[int, ...]:
    """The outputs of a piece that are memory which the piece allocates but does not fill."""
    root: dict[fx.Node, fx.Node] = {}
    filled: set[fx.Node] = set()
    for node in gm.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        inputs = [root[parent] for parent in node.all_input_nodes if parent in root]
        if node.op == "output" or node.op == "placeholder":
            continue
        if name.split(".")[0] in _ALLOCATES:
            root[node] = node
        elif inputs and name.split(".")[0] in _VIEWS:
            root[node] = inputs[0]
        else:
            filled |= set(inputs)
    outputs: Any = gm.graph.output_node().args[0]
    return tuple(at for at, node in enumerate(outputs) if node in root and root[node] not in filled)
