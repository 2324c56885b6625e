"""The tests of a law that nobody can enumerate, tried on models where it is known.

200,000 tokens of a model of 8 codes and images of 4, fixed seeds. What follows the law passes at 1e-3; a law that is
off by a total variation of 0.02 in every context is rejected: by T2 where mass moved to unlikely tokens, by T3 where
the mean surprisal stayed what it was. The power at this N is stated by the code under test.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sjd_engine import JacobiDecoder, lossless
from sjd_engine.testing import TableModel, decode, score_laws

VOCAB, TOKENS, COUNT = 8, 4, 50_000
OFF = 0.02


def table() -> TableModel:
    return TableModel(VOCAB, TOKENS, seed=5, spread=1.0)


def drifted(model: TableModel) -> TableModel:
    """Mass moved from the more likely to the less likely tokens."""
    return moved(model, lambda probs: -probs.log())


def drift_free(model: TableModel) -> TableModel:
    """Mass moved between tokens so that the mean surprisal stays."""
    return moved(model, lambda probs: probs.log() ** 2, keep=lambda probs: probs.log())


def moved(model: TableModel, direction, keep=None) -> TableModel:
    """p (1 + e r), r = `direction` without its part along 1 and `keep`, e such that each row moves OFF in all."""
    probs = model.tables.softmax(-1)
    r = direction(probs)
    basis = [torch.ones_like(probs)]
    if keep is not None:
        along = keep(probs)
        basis.append(along - (probs * along).sum(-1, keepdim=True))
    for b in basis:
        r = r - b * (probs * r * b).sum(-1, keepdim=True) / (probs * b * b).sum(-1, keepdim=True)
    change = probs * r
    changed = probs + OFF * change / (0.5 * change.abs().sum(-1, keepdim=True))
    assert changed.min() > 0
    other = table()
    other.tables = changed.log()
    return other


def scores(drawn_from: TableModel, law: TableModel, method: str = "maximal"):
    """Tokens that `method` draws from one model, scored by the law of another."""
    decoder = JacobiDecoder(
        batch_size=COUNT, num_tokens=TOKENS, vocab_size=VOCAB, window_size=3, method=method, seeds=range(COUNT)
    )
    tokens = decode(drawn_from, decoder)
    contexts = [torch.zeros(COUNT, dtype=torch.int64)]
    for position in range(TOKENS - 1):
        contexts.append(law.extend(contexts[-1], tokens[:, position]))
    return score_laws(law.logits(torch.stack(contexts, 1)), tokens)


@pytest.mark.parametrize("method", ["ar", "maximal"])
def test_exact_sampling_is_accepted(method):
    evidence = lossless.examine(scores(table(), table(), method), seed=0)
    assert not evidence.rejected
    assert evidence.num_tokens == COUNT * TOKENS
    assert evidence.outside == 0
    assert evidence.detectable_shift < OFF


def test_a_drift_is_found():
    evidence = lossless.examine(scores(drifted(table()), table()), seed=0)
    assert evidence.rejected
    assert evidence.drift > evidence.detectable_drift
    assert evidence.drift_p < 1e-10


def test_moved_mass_without_a_drift_is_found():
    evidence = lossless.examine(scores(drift_free(table()), table()), seed=0)
    assert evidence.rejected
    assert evidence.drift_p > 1e-3
    assert evidence.pit_p < 1e-10


def test_sjd_plus_plus_is_found():
    assert lossless.examine(scores(table(), table(), "sjd++"), seed=0).rejected


def test_tokens_outside_the_support_are_counted_and_only_rounding_excuses_them():
    z = torch.zeros(1, 1000, VOCAB)
    z[..., 0] = -torch.inf
    tokens = torch.arange(1000)[None] % (VOCAB - 1) + 1
    tokens[0, 500] = 0
    scored = score_laws(z, tokens)
    evidence = lossless.examine(scored, seed=0)
    assert (evidence.outside, evidence.num_tokens, evidence.rejected) == (1, 999, True)
    assert not lossless.examine(scored, seed=0, floor=1e-3).rejected


def test_mass_above_breaks_ties_by_id():
    scored = score_laws(torch.tensor([[[0.0, 1.0, 1.0, 0.0]]]).expand(4, 1, 4), torch.arange(4)[:, None])
    p = torch.tensor([0.0, 1.0, 1.0, 0.0]).softmax(0).tolist()
    assert scored.above.flatten().tolist() == pytest.approx([2 * p[1], 0, p[1], 2 * p[1] + p[0]])


def test_the_detectable_drift_is_found_in_99_of_100():
    z = torch.distributions.Normal(0, 1)
    alpha, spread, num_tokens = 1e-3, 12.0, 400
    shifted = lossless.detectable_drift(spread, num_tokens, alpha) * num_tokens / spread
    assert 1 - z.cdf(z.icdf(torch.tensor(1 - alpha / 2)) - shifted) == pytest.approx(0.99, abs=1e-4)


def test_the_oracle_excuses_what_rounding_can_do():
    assert lossless.oracle_p(0, 8192, 0.0) == 1
    assert lossless.oracle_p(1, 8192, 0.0) == 0
    assert lossless.oracle_p(1, 8192, 1e-4) > 0.5


def test_the_bench_tells_goes_on_and_refuses_another_run(tmp_path, monkeypatch, capsys):
    command = [
        "lossless.py",
        "--tokens",
        "256",
        "--batch",
        "1",
        "--methods",
        "maximal",
        "--tree",
        "2,2",
        "--oracle-images",
        "0",
    ]

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path), *more])
        return runpy.run_path(str(Path(__file__).parents[1] / "bench" / "lossless.py"))["main"]()

    assert run() == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["tree"], row["num_tokens"]) for row in first["rows"]] == [(None, 256), ([2, 2], 256)]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    with pytest.raises(ValueError, match="another run"):
        run("--top-k", "5")
