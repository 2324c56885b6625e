"""A decoder-only model of transformers in a family's place: its own modules run, over this engine's paged cache.

Attention alone is another: a function that transformers' AttentionInterface knows by name appends keys and values to
the pages and attends over them. The model stays as it is, and its weights are not copied, but for rows of the head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sjd_engine.errors import CheckpointError
from sjd_engine.kv_cache import PagedKVCache
from sjd_engine.models.base import Context, Defaults, ImageModel, Prompt
from sjd_engine.models.block import BlockConfig, Transformer
from sjd_engine.models.detokenizers.base import Detokenizer
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

ATTENTION = "sjd_paged"
OTHER_RULES = ("sliding_window", "softcap", "s_aux")  # of attention, as transformers' functions are given them
CHECKED = 6  # tokens
TOLERANCE = {torch.float32: 1e-3}  # of the largest logit
HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class PagedPass:
    """What every layer of one forward pass shares; see `models.block.Pass`."""

    kv_cache: PagedKVCache
    span: int
    window_bias: Tensor | None
    head_dim: int


def paged_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    paged_pass: PagedPass,
    **rules: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for a layer. queries [S, H, N, D], keys and values [S, KH, N, D] -> [S, N, H, D]."""
    asked = [name for name in OTHER_RULES if rules.get(name) is not None]
    if asked:
        raise CheckpointError(f"{type(module).__name__}: expected plain causal attention, got {', '.join(asked)}")
    run, unpadded = paged_pass, queries.shape[-1]
    scale = unpadded**-0.5 if scaling is None else scaling

    def stored(tensor: Tensor) -> Tensor:
        return F.pad(tensor.transpose(1, 2), (0, run.head_dim - unpadded)).to(run.kv_cache.pages.dtype)

    run.kv_cache.append(module.layer_idx, stored(keys), stored(values))
    queries = stored(queries * (scale * run.head_dim**0.5))  # attention divides by the root of the padded size
    out = run.kv_cache.attend(module.layer_idx, queries, run.span, run.window_bias)
    return out[..., :unpadded].to(values.dtype), None


@contextmanager
def attention_of(config: Any, name: str) -> Iterator[None]:
    """Let a model of transformers attend by the function called `name` meanwhile."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


class AttachedTransformer(Transformer):
    """See the module.

    Args:
        model: a ...ForCausalLM of transformers.
        codes: rows of its head.
    Raises: CheckpointError where its attention cannot be replaced.
    """

    def __init__(self, model: Any, codes: range):
        nn.Module.__init__(self)  # no parameters of its own but the head's
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, paged_attention)
        self._model, self.config = model, sizes_of(model.config)
        self.embedding = model.get_input_embeddings().weight
        head, span = model.get_output_embeddings(), slice(codes.start, codes.stop)
        self.head = nn.Parameter(head.weight.detach()[span].float(), requires_grad=False)
        bias = getattr(head, "bias", None)
        self.head_bias = None if bias is None else nn.Parameter(bias.detach()[span].float(), requires_grad=False)
        self._check(span)

    def embed(self, ids: Tensor) -> Tensor:
        return self._model.get_input_embeddings()(ids)

    @torch.inference_mode()
    def forward(
        self, x: Tensor, kv_cache: PagedKVCache, *, offsets: Tensor | None = None, window_bias: Tensor | None = None
    ) -> Tensor:
        """See `Transformer.forward`; what is returned is behind the final norm."""
        positions, span = kv_cache.positions(x.shape[1])
        if offsets is not None:
            positions = positions[:, :1] + offsets
        positions = positions.clamp_max(self.config.max_positions - 1)  # only slots past the image's end are clamped
        base = self._model.base_model
        with attention_of(base.config, ATTENTION):
            run = PagedPass(kv_cache, span, window_bias, self.config.head_dim)
            return base(inputs_embeds=x, position_ids=positions, use_cache=False, paged_pass=run)[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.head, self.head_bias)

    @torch.inference_mode()
    def _check(self, span: slice) -> None:
        """Raises: CheckpointError where a prompt and a window through the cache do not give the model's own logits."""
        name = type(self._model).__name__
        ids = torch.arange(CHECKED, device=self.embedding.device)[None]
        cache, outs = self.new_cache(1, CHECKED), []
        try:
            for part in ids.split(CHECKED // 2, 1):
                outs.append(self.logits(self(self.embed(part), cache)))
                cache.rollback(cache.context_lens + part.shape[1])
        except TypeError as error:
            raise CheckpointError(f"{name}: its attention cannot be replaced: {error}") from error
        expected = self._model(ids).logits[..., span].float()
        difference = (torch.cat(outs, 1) - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE.get(self.dtype, HALF_TOLERANCE):
            raise CheckpointError(
                f"{name}: over paged attention its logits differ by {difference:.1e} of the largest one; decode inside "
                "its own generate with custom_generate=sjd_engine.hf.generate"
            )


def sizes_of(config: Any) -> BlockConfig:
    """The sizes of a model by its config. What only the engine's own blocks read is left at 0.

    Raises: CheckpointError where one is missing.
    """
    try:
        heads = config.num_attention_heads
        return BlockConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=0,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            unpadded_head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_positions=config.max_position_embeddings,
            rope_theta=0.0,
            norm_eps=0.0,
        )
    except AttributeError as error:
        raise CheckpointError(
            f"{type(config).__name__}: expected the config of a decoder-only model: {error}"
        ) from None


class AttachedModel(ImageModel):
    """A decoder-only model of transformers for which this engine has no family, with what it does not say of itself.

        engine = Engine(AttachedModel(model, encode=..., codes=range(32000, 48384), schedule=Schedule(24, 24), ...))

    Args:
        model: a ...ForCausalLM of transformers.
        encode: a text to the ids before its image, at least one; "" gives those of guidance without a negative prompt.
        codes: vocabulary ids of the image codes, in their order.
        schedule: the image's grid, and forced tokens as vocabulary ids.
        detokenizer: codes to pixels.
        params: defaults of the sampling parameters.
        window_size: with which `window_size="auto"` begins.
    Raises: CheckpointError where the model's attention cannot be replaced; ValueError for bad arguments.
    """

    def __init__(
        self,
        model: Any,
        *,
        encode: Callable[[str], Sequence[int]],
        codes: range,
        schedule: Schedule,
        detokenizer: Detokenizer,
        params: SamplingParams | None = None,
        window_size: int = 16,
    ):
        head_rows = len(model.get_output_embeddings().weight)
        if codes.step != 1 or not 0 <= codes.start < codes.stop <= head_rows:
            raise ValueError(f"codes: expected a range of ids below {head_rows}, the rows of the head, got {codes!r}")
        self.name = getattr(model, "name_or_path", "") or type(model).__name__
        self.first_code, self.num_codes = codes.start, len(codes)
        self.detokenizer, self._encode, self._schedule = detokenizer, encode, schedule.of_codes(codes)
        self.check_codes(self.name)
        self.defaults = Defaults(window_size, SamplingParams() if params is None else params)
        self.image_size = (schedule.rows * detokenizer.patch_size, schedule.cols * detokenizer.patch_size)
        self.sizes = (self.image_size,)
        self.transformer = AttachedTransformer(model, codes)

    def build_prompt(self, prompt: str, negative_prompt: str | None, height: int, width: int) -> Prompt:
        return Prompt(self._context("prompt", prompt), self._context("negative_prompt", negative_prompt or ""))

    def _context(self, argument: str, text: str) -> Context:
        ids = list(self._encode(text))
        if not ids:
            raise ValueError(f"{argument}: expected encode to give a token at least, got none for {text!r}")
        return self.token_context(argument, ids, self._schedule)

    def schedule(self, height: int, width: int) -> Schedule:
        self.check_size(height, width)
        return self._schedule
