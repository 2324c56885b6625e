"""The draft head: its guesses, the errors where there is none, and a file that does not fit. That images keep their law
is shown in tests/models/test_families_exactness.py."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sjd_engine import CheckpointError, Engine, JacobiDecoder
from sjd_engine.drafting import Drafts
from sjd_engine.eagle import Chain, EagleDrafter
from sjd_engine.models import checkpoint_folder
from sjd_engine.models.draft_head import FILE, DraftHead
from sjd_engine.outputs import StepInfo

WINDOW, NUM_PASSES = 4, 30


@pytest.fixture(scope="module")
def engine() -> Engine:
    """With a head that guesses a little: the transformer's last layer, on its hidden state and the next token."""
    engine = Engine("emoji", device="cpu", dtype=torch.float32)
    head = DraftHead(engine.model.transformer.config)
    head.block.load_state_dict(engine.model.transformer.blocks[-1].state_dict())
    head.norm.data.fill_(1)
    head.w_in.data.copy_(torch.eye(256).repeat(1, 2))
    engine.model.draft_head = head.requires_grad_(False)
    return engine


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0], ids=["alone", "guided"])
def test_guesses_are_those_of_a_pass_over_the_whole_image(engine, guidance_scale, monkeypatch):
    """Of every draft of every chain: nothing that was rejected is left in the head's cache."""
    hidden, lengths, chains = [], [0], []
    call, weights = EagleDrafter.__call__, EagleDrafter._weights

    def spy_call(self: EagleDrafter, drafts: Drafts) -> None:
        (seen,) = self._seen
        num_committed = int(drafts.state.num_committed[0])
        hidden.append(seen.hidden[:, : num_committed - lengths[-1]])
        lengths.append(num_committed)
        chains.append([])
        call(self, drafts)
        chains[-1].append(drafts.state.tokens[:1, 1:].clone())

    def spy_weights(self: EagleDrafter, drafts: Drafts, chain: Chain) -> Tensor:
        chains[-1].append(chain.guess)
        return weights(self, drafts, chain)

    monkeypatch.setattr(EagleDrafter, "__call__", spy_call)
    monkeypatch.setattr(EagleDrafter, "_weights", spy_weights)
    arguments = {"method": "eagle", "window_size": WINDOW, "guidance_scale": guidance_scale, "output_type": "codes"}

    def stop(info: StepInfo) -> None:
        if info.passes == NUM_PASSES:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.generate("a red apple", **arguments, progress=False, callback_on_step=stop)
    assert NUM_PASSES < lengths[-1] < NUM_PASSES * WINDOW, "some drafts were accepted, some were not"

    whole = EagleDrafter(engine.model, batch_size=1, guided=guidance_scale > 1, capacity=300, window_size=300)
    pairs = torch.cat(hidden, 1)
    for length, (*guesses, tokens) in list(zip(lengths[1:], chains, strict=True))[5::7]:
        known = pairs[:, :length]
        for step, guess in enumerate(guesses):
            whole._kv_cache.context_lens.zero_()
            expected = whole._guess(whole._kv_cache, tokens[:, : length + step], known)[:, -1:]
            torch.testing.assert_close(guess, expected, atol=1e-4, rtol=1e-4)
            known = torch.cat((known, guess), 1)


def test_a_model_without_a_head(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "draft_head", None)
    with pytest.raises(
        ValueError, match=r"method: eagle drafts with a trained head, which emoji has none of: put eagle"
    ):
        engine.generate("a red apple", method="eagle")


def test_a_decoder_without_a_drafter():
    with pytest.raises(ValueError, match="drafter: eagle needs one"):
        JacobiDecoder(batch_size=1, num_tokens=4, vocab_size=4, window_size=2, seeds=[0], method="eagle")


@pytest.mark.parametrize("change", ["rows", "name"])
def test_a_head_of_another_model_is_refused(engine, tmp_path, change):
    folder = shutil.copytree(checkpoint_folder("emoji"), tmp_path / "checkpoint")
    tensors = {name: t.contiguous() for name, t in engine.model.draft_head.named_parameters()}
    tensors["w_in" if change == "rows" else "other"] = torch.zeros(128, 512)
    save_file(tensors, folder / FILE)
    with pytest.raises(CheckpointError, match=r"eagle\.safetensors: the weights do not fit"):
        Engine(folder, device="cpu")
