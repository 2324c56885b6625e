"""Exceptions of the package. Bad arguments are ValueError or TypeError."""


class SJDError(Exception):
    """Base of the package's own exceptions."""


class CheckpointError(SJDError):
    """A checkpoint that is missing, truncated, foreign or inconsistent with its config."""
