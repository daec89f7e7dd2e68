"""Turns a model into distinct pieces: capture, split, fingerprint, stamp. Pure FX: no I/O, no compiler."""
