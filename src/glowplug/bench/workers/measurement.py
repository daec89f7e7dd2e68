"""One measurement in a process of its own: `python -m glowplug.bench.workers.measurement '<json spec>'`.

The last line of its output is the record as JSON; a strategy that fails gives a record with its error, and with what
had been measured by then.
"""

from __future__ import annotations

from glowplug.bench.measure import measure
from glowplug.bench.results.record import Record, error_record
from glowplug.bench.spec import Spec
from glowplug.bench.workers.isolate import print_answer, run_worker

if __name__ == "__main__":
    measured: Record = {}

    def keep(record: Record) -> None:
        measured.update(record)
        print_answer(record)

    run_worker(
        lambda spec: measure(Spec(**spec), keep), lambda spec, error: error_record(Spec(**spec), error, measured)
    )
