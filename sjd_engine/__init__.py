"""Lossless speculative Jacobi decoding for autoregressive image models."""

from sjd_engine import hf
from sjd_engine.decoder import JacobiDecoder
from sjd_engine.engine import Engine
from sjd_engine.errors import CheckpointError, SJDError
from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.outputs import Generation, ImageStats, StepInfo, StreamEvent
from sjd_engine.pipeline import SJDPipeline
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Engine",
    "Generation",
    "ImageStats",
    "JacobiDecoder",
    "PagedKVCache",
    "SJDError",
    "SJDPipeline",
    "SamplingParams",
    "Schedule",
    "StepInfo",
    "StreamEvent",
    "__version__",
    "hf",
]
