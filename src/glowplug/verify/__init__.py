"""One rule decides whether a program may serve: its uncompiled form equals the model's own forward, and each compiled
piece equals its own graph on the same inputs. Both are found out in one run of each case."""
