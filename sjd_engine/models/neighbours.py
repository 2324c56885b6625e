"""The tables of neighbouring codes that a checkpoint may bring along."""

from pathlib import Path

from sjd_engine.errors import CheckpointError
from sjd_engine.models.checkpoint import read_tensors
from sjd_engine.neighbours import NeighbourTables

FILE = "neighbours.safetensors"  # beside the weights of the transformer


def load_neighbours(folder: Path, num_codes: int) -> NeighbourTables | None:
    """The tables that lie in a checkpoint's folder; None where there are none.

    Raises: CheckpointError where the file is damaged, or of a model with other codes.
    """
    path = folder / FILE
    if not path.exists():
        return None
    tensors = read_tensors(path)
    try:
        tables = NeighbourTables(**tensors)
    except TypeError:
        names = ", ".join(sorted(tensors))
        raise CheckpointError(f"{path}: expected prior, rest, codes and lift, got {names}") from None
    listed = tables.codes.shape[-1]
    shapes = {"prior": (num_codes,), "rest": (2, num_codes), "codes": (2, num_codes, listed)}
    shapes["lift"] = shapes["codes"]
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{path}: {name} must be {list(shape)}, got {list(tensors[name].shape)}")
    if not 0 <= tables.codes.min() <= tables.codes.max() < num_codes:
        raise CheckpointError(f"{path}: expected codes in 0..{num_codes - 1}; the file is damaged")
    return tables
