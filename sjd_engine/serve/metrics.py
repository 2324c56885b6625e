"""What a server counts, in Prometheus' words and, where vLLM has a name for it, under that name."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sjd_engine.engine import Engine
from sjd_engine.outputs import ImageStats

SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """Counters of one application. What its thread counts, any thread may read."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        scheduler, pool = engine.scheduler, engine.scheduler.prompts.kv_cache

        def usage() -> float:
            return 1 - pool.num_free_pages / pool.num_pages

        self._gauge("num_requests_running", "Images under way.", lambda: len(scheduler.running))
        self._gauge("num_requests_waiting", "Images that wait for a row or for pages.", lambda: len(scheduler.waiting))
        self._gauge("kv_pages_in_use", "Pages of the key/value cache.", lambda: pool.num_pages - pool.num_free_pages)
        self._gauge("kv_cache_usage_perc", "Share of its pages in use, 0 to 1.", usage)
        self._ended = self._counter("request_success", "Accepted requests that have ended.", "finished_reason")
        self._refused = self._counter("requests_refused", "Requests that were not accepted.", "reason")
        self._latency = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its last image.")
        self._image_latency = self._histogram("image_latency_seconds", "From an image's first pass to its last token.")
        self._images = self._counter("images", "Images that are complete.")
        self._iterations = self._counter("iterations", "Forward passes of complete images (NFE).")
        self._tokens = self._counter("tokens", "Tokens of complete images.")
        self._drafts = self._counter("spec_decode_num_drafts", "Passes that verified drafts.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafts that were verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafts that were accepted.")
        self._tokens_seen = self._iterations_seen = 0
        self._gauge(
            "step_compression_ratio",
            "Tokens for each forward pass of all complete images.",
            lambda: self._tokens_seen / max(self._iterations_seen, 1),
        )

    def request_ended(self, reason: str, seconds: float) -> None:
        """reason: stop, error, timeout or abort (its client has left)."""
        self._ended.labels(reason).inc()
        if reason == "stop":
            self._latency.observe(seconds)

    def request_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def image_done(self, stats: ImageStats) -> None:
        self._images.inc()
        self._iterations.inc(stats.nfe)
        self._tokens.inc(stats.num_tokens)
        self._iterations_seen += stats.nfe
        self._tokens_seen += stats.num_tokens
        self._image_latency.observe(stats.seconds)
        for drafted, accepted in draft_counts(stats):
            self._drafts.inc()
            self._draft_tokens.inc(drafted)
            self._accepted.inc(accepted)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        Gauge(f"sjd:{name}", help, registry=self._registry).set_function(value)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"sjd:{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"sjd:{name}", help, buckets=SECONDS, registry=self._registry)


def draft_counts(stats: ImageStats) -> list[tuple[int, int]]:
    """(drafts verified, drafts accepted) of each pass that verified some.

    A pass over a window of W slots verifies the W - 1 drafts behind its anchor, or as many as tokens are left. Of the
    tokens it commits the last one is counted as its own, the others as accepted drafts: where an image's last draft is
    accepted, too, that is one too few. So 1 + accepted / drafts is the mean number of tokens that a pass commits.
    """
    counts, left = [], stats.num_tokens
    for window, committed in zip(stats.window_sizes, stats.committed_per_pass, strict=True):
        drafted = min(window - 1, left)
        if drafted:
            counts.append((drafted, max(committed - 1, 0)))
        left -= committed
    return counts
