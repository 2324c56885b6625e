"""T1 on real adapters: every exact method on tiny Lumina-mGPT (line breaks, end tokens) and Janus (codes embedded by a
table of their own), images of 2x2 codes, guided, top-k 2, so that an image is one of 16.

The law is computed by full passes without a cache over all prefixes. N = 8,000 images for each method and family are
drawn with the decoder over the adapter and the paged cache (`eagle` with a random head), and the G-test at 1e-5 a test
must pass; a total variation of 0.05 would be found with 99 % (the non-central chi-square of 15 degrees of freedom). A
cache that keeps a rejected token must fail in the same run, and so must SJD++ on Janus, and drafts that are verified by
a law they were not drawn from. `Engine.generate` must give, seed for seed, the images of that run: 60 of them for each
method, of which one may differ, since the batch changes the rounding of the logits.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import PROMPT, janus_checkpoint, lumina_checkpoint, randomise
from torch import Tensor

from sjd_engine import Engine, JacobiDecoder, SamplingParams
from sjd_engine.drafting import Drafts
from sjd_engine.eagle import EagleDrafter, Seen
from sjd_engine.methods import METHODS
from sjd_engine.models.base import ImageModel
from sjd_engine.models.draft_head import DraftHead
from sjd_engine.ops import warp
from sjd_engine.testing import FUSED, g_test, teacher_forced_logits

SIGNIFICANCE = 1e-5
LOSSLESS = [name for name in FUSED if METHODS[name].lossless]
SIDE = 32  # pixels: 2x2 codes
COUNT, ROWS, WINDOW, ENGINE_COUNT = 8_000, 1000, 4, 60
PARAMS = SamplingParams(guidance_scale=1.5, top_k=2, temperature=1.5)


class Rows:
    """Both contexts of `PROMPT` in `ROWS` sequences each, to draw images after them again and again."""

    def __init__(self, model: ImageModel):
        self.model, self.schedule = model, model.schedule(SIDE, SIDE)
        self.contexts = model.build_prompt(PROMPT, None, SIDE, SIDE).contexts(guided=True)
        self.longest = max(map(len, self.contexts)) + self.schedule.num_tokens + WINDOW
        self.cache = model.transformer.new_cache(2 * ROWS, self.longest, page_size=16, poison=WINDOW)
        self.prefix_lens = torch.empty(2 * ROWS, dtype=torch.int32)
        anchors = []
        for i, context in enumerate(self.contexts):
            rows = slice(i * ROWS, (i + 1) * ROWS)
            embeddings = model.context_embeddings(context)
            model.transformer(embeddings[:-1].expand(ROWS, -1, -1), self.cache.select(rows))
            self.prefix_lens[rows] = len(context) - 1
            anchors.append(embeddings[-1:].expand(ROWS, -1))
        self.anchors = torch.cat(anchors)

    def drafter(self) -> EagleDrafter:
        """Of the model's head, for new images after both contexts."""
        drafter = EagleDrafter(self.model, batch_size=ROWS, guided=True, capacity=self.longest, window_size=WINDOW)
        for sequence in range(2 * ROWS):
            drafter.begin(sequence, len(self.contexts[sequence % 2]))
        return drafter

    def draw(self, method: str, first_seed: int, kept: int = 0) -> Tensor:
        """[ROWS, 4] codes. kept: rejected tokens that the cache takes for committed ones."""
        drafter = self.drafter() if METHODS[method].trained else None
        decoder = JacobiDecoder(
            batch_size=ROWS,
            num_tokens=self.schedule.num_tokens,
            vocab_size=self.model.num_codes,
            window_size=WINDOW,
            method=method,
            params=PARAMS,
            schedule=self.schedule,
            seeds=range(first_seed, first_seed + ROWS),
            drafter=drafter,
        )
        self.cache.rollback(self.prefix_lens)
        while not decoder.done:
            ids, _ = decoder.window()
            windows = self.model.window_embeddings(ids.repeat(2, 1), self.anchors)
            hidden = self.model.transformer(windows, self.cache)
            if drafter is not None:
                pairs = hidden.unflatten(0, (2, ROWS)).transpose(0, 1).flatten(0, 1)
                drafter.see(Seen(torch.arange(ROWS), torch.arange(2 * ROWS), pairs, self.longest - WINDOW))
            result = decoder.verify(self.model.transformer.logits(hidden).unflatten(0, (2, ROWS)))
            self.cache.rollback(self.prefix_lens + (result.num_committed + kept).repeat(2))
        return decoder.token_ids[:, self.schedule.image_positions]

    def law(self) -> tuple[Tensor, Tensor]:
        """([16, 4] images, [16] float64: their probabilities)."""
        tokens, law = torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
        arguments = PARAMS.warp_arguments(1, self.model.num_codes, torch.device("cpu"))
        for position in range(self.schedule.num_tokens):
            if position in self.schedule.forced:
                tokens = torch.cat((tokens, torch.full((len(tokens), 1), self.schedule.forced[position])), 1)
                continue
            known = F.pad(tokens, (0, 1))  # the last position predicts, what stands there is not read
            logits = torch.stack([teacher_forced_logits(self.model, c, known)[:, -1:] for c in self.contexts])
            logits = logits.transpose(1, 2)  # one image whose window is all prefixes: the same warping for each
            probs, ids = warp(logits, **arguments)[0][0].double().softmax(-1).topk(PARAMS.top_k)
            tokens = torch.cat((tokens.repeat_interleave(PARAMS.top_k, 0), ids.reshape(-1, 1)), 1)
            law = (law[:, None] * probs).flatten()
        return tokens[:, self.schedule.image_positions], law


@pytest.fixture(scope="module", params=["lumina", "janus"])
def rows(request, tmp_path_factory) -> Rows:
    folder = tmp_path_factory.mktemp(request.param)
    case = lumina_checkpoint(folder, swin=False) if request.param == "lumina" else janus_checkpoint(folder, True)
    model = case.load()
    model.sizes, model.image_size = ((SIDE, SIDE),), (SIDE, SIDE)
    model.draft_head = randomise(DraftHead(model.transformer.config))
    return Rows(model)


@pytest.fixture(scope="module")
def p_value(rows) -> Callable[[Tensor], float]:
    """Of the G-test of images; zero where one of them cannot be."""
    images, law = rows.law()

    def test(drawn: Tensor) -> float:
        equal = (drawn[:, None] == images).all(-1)
        if not equal.any(1).all():
            return 0.0
        return g_test(equal.sum(0), law)

    return test


@pytest.fixture(scope="module")
def drawn(rows) -> Callable[..., Tensor]:
    """[COUNT, 4] images by method, seeds from 0."""
    return lambda method, kept=0: torch.cat([rows.draw(method, first, kept) for first in range(0, COUNT, ROWS)])


@pytest.mark.parametrize("method", LOSSLESS)
def test_lossless_methods_follow_the_law_of_full_passes(rows, drawn, p_value, method):
    images = drawn(method)
    assert p_value(images) > SIGNIFICANCE
    engine = Engine(rows.model, max_batch_size=ENGINE_COUNT // 2, batch_invariant=False, page_size=16)
    out = engine.generate(
        PROMPT,
        method=method,
        window_size=WINDOW,
        num_images_per_prompt=ENGINE_COUNT,
        guidance_scale=PARAMS.guidance_scale,
        top_k=PARAMS.top_k,
        temperature=PARAMS.temperature,
        output_type="codes",
        progress=False,
    )
    assert (out.token_ids == images[:ENGINE_COUNT]).all(1).sum() >= ENGINE_COUNT - 1


@pytest.mark.parametrize("rows", ["janus"], indirect=True)
def test_sjd_plus_plus_fails(rows, drawn, p_value):
    assert p_value(drawn("sjd++")) < 1e-10


def test_a_rejected_token_in_the_cache_fails(drawn, p_value):
    assert p_value(drawn("maximal", kept=1)) < 1e-10


@pytest.mark.parametrize("rows", ["janus"], indirect=True)
def test_drafts_verified_by_another_law_fail(rows, p_value, monkeypatch):
    redraw = Drafts.redraw

    def uniform(self: Drafts, row: int, weights: Tensor, where: Tensor) -> None:
        redraw(self, row, weights, where)
        self.state.drafted[:, row], self.state.drafted_scale[:, row] = 1.0, 1 / weights.shape[-1]

    monkeypatch.setattr(Drafts, "redraw", uniform)
    assert p_value(rows.draw("eagle", 0)) < 1e-10


def test_rows_side_by_side_give_the_image_of_ar_where_each_waits_for_the_whole_row_above(rows):
    """Line breaks stand before every row but the first of one model, and the other has none."""
    engine = Engine(rows.model, max_batch_size=16, batch_invariant=False, page_size=16)
    arguments = {"num_images_per_prompt": 16, "seed": 5, "output_type": "codes", "progress": False}
    ar = engine.generate(PROMPT, method="ar", **arguments)
    for method in ("zipar", "zipar-adaptive"):
        out = engine.generate(PROMPT, method=method, zipar_window=2, **arguments)
        assert torch.equal(out.token_ids, ar.token_ids)
        assert all(sum(stats.committed_per_pass) == rows.schedule.num_tokens for stats in out.stats)
    assert engine.generate(PROMPT, method="zipar", zipar_window=1, **arguments).stats[0].nfe == 3
