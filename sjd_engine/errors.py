"""Exceptions of the package. Bad arguments are ValueError or TypeError."""

from importlib.util import find_spec


class SJDError(Exception):
    """Base of the package's own exceptions."""


class CheckpointError(SJDError):
    """A checkpoint that is missing, truncated, foreign or inconsistent with its config."""


class MissingExtraError(SJDError, ImportError):
    """An optional part of the package whose dependencies are not installed."""


def require(extra: str, *packages: str) -> None:
    """Raises: MissingExtraError with the one command that adds `packages`, where one of them is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)}: expected to be installed, and is not; pip install 'sjd-engine[{extra}]'"
        )
