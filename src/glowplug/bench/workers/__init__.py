"""Modules that run in a process of their own, and what starts such a process."""
