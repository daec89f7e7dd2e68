"""`glowplug generate`: compiles a local model, streams its text, and says how long it took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, TextStreamer

import glowplug
from glowplug.bench.models import find_folder, load_model, one_line
from glowplug.bench.presets import PRESETS
from glowplug.bench.runner import check_writable
from glowplug.checkpoints import CHECKPOINTS
from glowplug.cli.console import quiet_transformers
from glowplug.errors import UsageError


class TimedStreamer(TextStreamer):
    """Prints text as it arrives, and records when each token arrived."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take the prompt, and then each token."""
        self.times.append(time.perf_counter())
        super().put(value)


def generate(
    model: Annotated[
        str, typer.Argument(help=f"A folder with a language model and its tokenizer, or {' or '.join(CHECKPOINTS)}.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to add.")] = 64,
    identity: Annotated[str, typer.Option(help="auto, hoisted, ordered or baked.")] = "auto",
    experts: Annotated[str, typer.Option(help="auto, inline or opaque.")] = "auto",
    compiler: Annotated[str, typer.Option(help="inductor, or eager: pieces uncompiled.")] = "inductor",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    report: Annotated[Path | None, typer.Option(help="Write the report and the program to this folder.")] = None,
) -> None:
    """Continue a text greedily with a compiled model, and print the time to the first token and the speed after it."""
    quiet_transformers()
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if model in PRESETS:
        raise UsageError(f"{model} is a preset with random weights and no tokenizer; give a local folder")
    folder = str(find_folder(model))
    if report is not None:
        _check_folder(report)
    glowplug.Options(identity=identity, experts=experts, compiler=compiler)  # type: ignore[arg-type]
    language_model = load_model(folder, device=device)
    tokenizer, inputs = _tokenize(folder, prompt, language_model.config.get_text_config().vocab_size)
    streamer = TimedStreamer(tokenizer)
    start = time.perf_counter()
    glowplug.compile(language_model, identity=identity, experts=experts, compiler=compiler)
    with torch.no_grad():
        generator: Any = language_model
        generator.generate(
            **inputs.to(language_model.device), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
    print(_speed(streamer.times, start))
    if report is not None:
        print(f"report and program in {glowplug.report(language_model).save(report)}")


def _check_folder(path: Path) -> None:
    """Make a folder, and raise `UsageError` if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise UsageError(f"--report takes a folder, and {path} is a file") from exc
    except OSError as exc:
        raise UsageError(f"can't make the folder {path}: {exc.strerror or exc}") from exc
    check_writable(path / "report.json")


def _tokenize(folder: str, prompt: str, vocab_size: int) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        inputs = tokenizer(prompt, return_tensors="pt")
    except Exception as exc:  # tokenizers' own errors, of many classes, for missing and broken files
        raise UsageError(f"{folder} has no tokenizer that transformers can load: {one_line(exc)}") from exc
    ids = inputs["input_ids"]
    if ids.shape[-1] == 0:
        raise UsageError("--prompt has no tokens; give it some text")
    if int(ids.max()) >= vocab_size:
        raise UsageError(f"the tokenizer in {folder} has tokens that its model, of {vocab_size}, does not know")
    inputs.pop("token_type_ids", None)
    return tokenizer, inputs


def _speed(times: list[float], start: float) -> str:
    """Time to the first token, and tokens per second after it; the first time is the prompt's."""
    tokens = len(times) - 1
    text = f"first token after {times[1] - start:.2f} s"
    if tokens > 1:
        text += f", then {(tokens - 1) / (times[-1] - times[1]):.1f} tokens/s ({tokens} tokens)"
    return text
