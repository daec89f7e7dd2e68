"""Trains the checkpoints under src/glowplug/checkpoints/ on a CPU, from text that ships with Python itself.

    python scripts/train_tiny.py tiny-gpt-oss  --out NEW/tiny-gpt-oss
    python scripts/train_tiny.py tiny-ernie-vl --out NEW/tiny-ernie-vl

The text is the language reference in ``pydoc_data.topics`` and the docstrings of the standard library. It is split
into documents, each of which belongs to the training or to the held-out part by its hash; paragraphs that occur more
than once are kept once, so none is in both parts. The figure of merit is bits per byte: the cross-entropy of the
held-out part, in bits, over its length in UTF-8 bytes.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import platform
import re
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CONTEXT, VOCAB = 256, 1024
BATCH, RATE = 16, 4e-3
"""Windows of a step, and the highest learning rate."""
EOS, PAD = 0, 1
VISION = ("image", "image_start", "image_end", "video", "video_start", "video_end")
SPECIAL = ["<|endoftext|>", "<|pad|>", *(f"<|{name}|>" for name in VISION)]
PROMPT = "The with statement"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "idlelib", "pydoc_data", "turtledemo", "site-packages"}


class Corpus(NamedTuple):
    """The two parts of the text, each a list of documents."""

    train: list[str]
    held_out: list[str]


def raw_documents() -> Iterator[str]:
    """Sections of the language reference, then one document per top-level definition of each module."""
    for name in sorted(topics):
        yield from re.split(r"\n(?=[^\n]+\n[*=\-~\"^]{3,}\n)", topics[name])
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield from documented(ast.parse(path.read_text("utf-8")))


def documented(module: ast.Module) -> Iterator[str]:
    """The module's own docstring, then each top-level statement's docstrings joined together."""
    yield ast.get_docstring(module) or ""
    for statement in module.body:
        found = (
            ast.get_docstring(node) or ""
            for node in ast.walk(statement)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        )
        yield "\n\n".join(found)


def prose(document: str) -> Iterator[str]:
    """The paragraphs of a document that are sentences, each on one line, without reStructuredText's role markup."""
    for block in re.split(r"\n\s*\n", document):
        lines = inspect.cleandoc(block).split("\n")
        text = " ".join(line.strip() for line in lines if not re.fullmatch(r"\s*[*=\-~\"^]{3,}\s*", line))
        text = re.sub(r":[a-z:]+:`([^`]*)`", r"\1", text).replace("``", "`")
        text = re.sub(r"\s+", " ", text).strip()
        plain = sum(letter.isalpha() or letter == " " for letter in text)
        if len(text) >= 24 and plain >= 0.82 * len(text) and " " in text and not re.search(r">>>|::=|[|{}\\]", text):
            yield text


def read_corpus() -> Corpus:
    """All documents, without repeated paragraphs, split nineteen to one by their hash."""
    corpus, seen = Corpus([], []), set[str]()
    for raw in raw_documents():
        kept = []
        for paragraph in prose(raw):
            key = re.sub(r"[^a-z]+", " ", paragraph.lower())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n".join(kept)
        if len(document) >= 64:
            digest = hashlib.sha256(document.encode()).digest()
            corpus.held_out.append(document) if digest[0] % 20 == 0 else corpus.train.append(document)
    corpus.train.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
    return corpus


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; every byte has a token, so any text survives a round trip."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def as_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """The documents one after another, each preceded by the end-of-text token, and one at the very end."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for document in encoded for token in (EOS, *document)] + [EOS])


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * CONTEXT,
    "initializer_range": 0.04,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def tiny_gpt_oss() -> PreTrainedModel:
    """gpt-oss, narrow but as deep as gpt-oss-20b: sliding and full attention in turn, sinks, experts with biases."""
    narrow = {"hidden_size": 48, "num_hidden_layers": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = GptOssConfig(
        **COMMON | narrow,
        head_dim=32,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM._from_config(config, dtype=torch.float32)
    quieten(model)
    return model


@torch.no_grad()
def quieten(model: PreTrainedModel) -> None:
    """Scales what each layer adds to the residual stream so that the sum over all layers does not grow with depth."""
    for name, tensor in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            tensor.div_(math.sqrt(2 * model.config.num_hidden_layers))


def tiny_ernie_vl() -> PreTrainedModel:
    """ERNIE 4.5 VL in small: a dense layer, then layers with text, vision and shared experts; a one-block tower."""
    text = COMMON | {
        "intermediate_size": 320,
        "moe_intermediate_size": [96, 32],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
    special = {f"{name}_token_id": SPECIAL.index(f"<|{name}|>") for name in VISION}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, eos_token_id=EOS, pad_token_id=PAD, **special)
    return Ernie4_5_VLMoeForConditionalGeneration._from_config(config, dtype=torch.float32)


class Name(StrEnum):
    """The checkpoints this script can train."""

    gpt_oss = "tiny-gpt-oss"
    ernie_vl = "tiny-ernie-vl"


BUILD = {Name.gpt_oss: tiny_gpt_oss, Name.ernie_vl: tiny_ernie_vl}
AUTO: dict[Name, Any] = {Name.gpt_oss: AutoModelForCausalLM, Name.ernie_vl: AutoModelForImageTextToText}


@torch.no_grad()
def rescale_vision_experts(model: PreTrainedModel) -> None:
    """Makes the untrained vision experts louder than the trained text experts, so that they cannot go unnoticed."""
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if "vision_moe" in name and tensor.std() > 0:
            loudness = 4 if ".experts." in name else 1
            tensor.mul_(loudness * tensors[name.replace("vision_moe", "text_moe")].std() / tensor.std())


def train(model: PreTrainedModel, stream: torch.Tensor, steps: int) -> None:
    """AdamW over windows at random places; the rate warms up, then falls along a cosine. Products are bfloat16."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    warmup = max(1, steps // 20)
    offsets = torch.arange(CONTEXT + 1)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = RATE * min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        windows = stream[torch.randint(len(stream) - CONTEXT, (BATCH, 1)) + offsets]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=windows[:, :-1], output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), windows[:, 1:].flatten())
        (loss + 0.01 * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            pace = (time.perf_counter() - start) / (step + 1)
            print(f"step {step:5d}  loss {loss.item():.3f}  {pace:.3f} s/step", flush=True)
    model.eval()


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    """Cross-entropy of every token of the documents, in windows that do not overlap, over the documents' bytes."""
    stream, nats = as_stream(tokenizer, documents), 0.0
    for begin in range(0, len(stream) - 1, CONTEXT):
        window = stream[begin : begin + CONTEXT + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits
        nats += F.cross_entropy(logits[0].double(), window[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [tiny, mixture-of-experts, test-model]
---

# {name}

{about}

A real, trained language model, small enough to ship with a repository: it stands in for the large one in tests and
demonstrations, and its text shows at a glance whether a runtime computes the right thing. It has no other use.

| | |
| --- | --- |
| class | `{cls}`, loaded with `{auto}.from_pretrained` |
| parameters | {parameters:,} ({active:,} take part in text) |
| stored as | float16; loads as float32 |
| tokenizer | byte-level BPE, {vocab} tokens |
| trained on | {train_bytes:,} bytes of text, {steps:,} steps of {batch} windows of {context} tokens |
| **held-out bits per byte** | **{bpb:.3f}** on {held_documents} documents, {held_bytes:,} bytes |
{extra}
The prompt "{prompt}" continues, greedily:

> {sample}

## Data

The text is English prose from Python's own standard library ({python}): the language reference in
`pydoc_data.topics` and the docstrings of the library's modules, without code samples and repeated paragraphs.
{notice} It is used under the
[PSF licence, version 2](https://docs.python.org/3/license.html). Whole documents are held out by hash (one in
twenty); no paragraph is in both parts. Bits per byte is the cross-entropy of the held-out part, in bits, over its
length in UTF-8 bytes.

## Reproduce

    python scripts/train_tiny.py {name} --steps {steps} --out NEW/{name}

Made with PyTorch {torch} and transformers {transformers}. The seed is fixed; another Python release has slightly
different text, and another processor rounds differently, so the figures repeat only approximately.
"""

ABOUT = {
    Name.gpt_oss: "gpt-oss, narrow but as deep as gpt-oss-20b: 24 layers, sliding-window (64 tokens) and full "
    "attention in turn, attention sinks, and in each layer four experts with biases, of which a token takes two.",
    Name.ernie_vl: "ERNIE 4.5 VL in small: a dense layer, then three mixture-of-experts layers, each with four text "
    "experts and four vision experts, of which a token takes two from its own kind, and a shared expert.",
}

VISION_NOTE = """
Only the text half is trained. The vision tower, the resampler and the vision experts hold random numbers, and the
vision experts' are four times as large as those of the text experts. Text that is sent through the vision experts by
mistake comes out as garbage: {bpb:.2f} bits per byte.
"""


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder; the weights are float16 on disk, and the configuration asks for float32 on load."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"float16"', '"float32"'))


@torch.no_grad()
def vision_bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    """What :func:`bits_per_byte` would be if every token went to the vision experts."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args: (args[0], torch.ones(args[0].shape[:2], dtype=torch.int)))
        for module in model.modules()
        if hasattr(module, "vision_moe")
    ]
    bits = bits_per_byte(model, tokenizer, documents)
    for hook in hooks:
        hook.remove()
    return bits


def report(name: Name, folder: Path, corpus: Corpus, steps: int) -> str:
    """Loads the folder afresh, as a user would, measures it, and returns its model card."""
    model, tokenizer = AUTO[name].from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if model.dtype != torch.float32:
        raise RuntimeError(f"{folder} loads as {model.dtype}, not as float32")
    for text in (*corpus.held_out, " \t\n\x00é漢🙂 ,a ."):
        if tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) != text:
            raise RuntimeError(f"the tokenizer changes {text!r} on a round trip")
    bpb = bits_per_byte(model, tokenizer, corpus.held_out)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    sample = tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=False)[0])
    extra = ""
    if name is Name.ernie_vl:
        extra = VISION_NOTE.format(bpb=vision_bits_per_byte(model, tokenizer, corpus.held_out[:40]))
    print(f"{name.value}: {bpb:.4f} bits per byte held out\n{sample}{extra}")
    return CARD.format(
        name=name.value,
        about=textwrap.fill(ABOUT[name], 118),
        cls=type(model).__name__,
        auto=AUTO[name].__name__,
        parameters=model.num_parameters(),
        active=sum(p.numel() for key, p in model.named_parameters() if not re.search("vision|resampler", key)),
        vocab=len(tokenizer),
        train_bytes=sum(len(document.encode()) for document in corpus.train),
        steps=steps,
        batch=BATCH,
        context=CONTEXT,
        bpb=bpb,
        held_documents=len(corpus.held_out),
        held_bytes=sum(len(document.encode()) for document in corpus.held_out),
        extra=extra,
        prompt=PROMPT,
        sample=sample.replace("\n", "\n> "),
        notice=sys.copyright.splitlines()[0],
        python=f"CPython {platform.python_version()}",
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def main(
    name: Annotated[Name, typer.Argument(help="The checkpoint to train.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
) -> None:
    """Train one of the tiny checkpoints, save it, load it afresh and print its held-out bits per byte."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train)
    stream = as_stream(tokenizer, corpus.train)
    model = BUILD[name]()
    model.set_experts_implementation("grouped_mm")
    print(f"{len(corpus.train)} documents, {len(stream):,} tokens; {model.num_parameters():,} parameters", flush=True)
    train(model, stream, steps)
    rescale_vision_experts(model)
    save(model, tokenizer, out)
    (out / "README.md").write_text(report(name, out, corpus, steps))


if __name__ == "__main__":
    typer.run(main)
