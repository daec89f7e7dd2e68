"""One measurement in a process of its own: `python -m glowplug.bench.workers.measurement '<json spec>'`.

The last line of its output is the record as JSON; a strategy that fails gives a record with its error.
"""

from __future__ import annotations

from glowplug.bench.measure import measure
from glowplug.bench.results.record import error_record
from glowplug.bench.spec import Spec
from glowplug.bench.workers.isolate import run_worker

if __name__ == "__main__":
    run_worker(lambda spec: measure(Spec(**spec)), lambda spec, error: error_record(Spec(**spec), error))
