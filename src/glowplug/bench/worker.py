"""One measurement in a process of its own: `python -m glowplug.bench.worker '<json spec>'`.
The last line of its output is the record as JSON; a strategy that fails gives a record with its error.
"""

from __future__ import annotations

import json
import sys

from transformers.utils import logging

from glowplug.bench.measure import measure
from glowplug.bench.models import one_line
from glowplug.bench.record import error_record
from glowplug.bench.spec import Spec


def main(arguments: list[str]) -> int:
    """Measure what the one argument specifies, and print the record."""
    spec = Spec.from_json(arguments[0])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        record = measure(spec)
    except Exception as exc:  # a failing strategy is a result
        record = error_record(spec, f"{type(exc).__name__}: {one_line(exc)}")
    print("\n" + json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
