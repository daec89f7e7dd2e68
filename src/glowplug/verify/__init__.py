"""Verifies a program: its uncompiled form must equal the model's own forward, and each compiled piece must equal its
own graph on the same inputs. One run of each case checks both."""
