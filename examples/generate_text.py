"""Compile a transformers model and generate with it.

python examples/generate_text.py [FOLDER]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import glowplug
from glowplug.checkpoints import find_checkpoint


def main(folder: str | Path) -> None:
    """Load, compile, generate, report."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = glowplug.compile(AutoModelForCausalLM.from_pretrained(folder))
    inputs = tokenizer("The with statement", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(glowplug.report(model))


if __name__ == "__main__":
    main(*sys.argv[1:] or [find_checkpoint("tiny-gpt-oss")])
