"""From a traced model to distinct pieces: capture, split, fingerprint. Pure FX: no I/O, no compiler."""
