"""The decode loop inside transformers: `model.generate(..., custom_generate=sjd_engine.hf.generate)` on models as they
are, and the image loop of Janus, which never reaches `custom_generate`.

    ids = model.generate(**inputs, do_sample=True, max_new_tokens=256, custom_generate=sjd_engine.hf.generate, seed=7)

A pass is one forward of the model over a window of drafts. Guidance is a second half of its batch, in the place of the
processor that runs a forward of one token by itself. transformers is imported where its objects are at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sjd_engine.decoder import JacobiDecoder
from sjd_engine.hf_cache import CachedRows, check_cache, prompt_positions
from sjd_engine.models.attached import AttachedModel
from sjd_engine.request import seed_list
from sjd_engine.sampling import SamplingParams
from sjd_engine.schedule import Schedule

__all__ = ["AttachedModel", "generate", "generate_image"]

WINDOW_SIZE = 16
INIT = "above-sample"
PREPARED = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")
NOT_KEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# What remembers earlier calls, or halves the batch: of no use to a window, whose rows are drafts.
STATEFUL = ("ClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: Any,
    *,
    method: str | None = None,
    window_size: int = WINDOW_SIZE,
    init: str = INIT,
    reuse_threshold: float = 0.5,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    codes: range | None = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop that `generate` calls after its own preparations; its callers name the arguments from `method`
    on among those of `generate`.

    Args:
        method: see `sjd_engine.methods`; None for maximal, and for jacobi where do_sample is off.
        window_size: tokens of a forward pass, >= 1.
        init, reuse_threshold: see `JacobiDecoder`.
        seed: an int (sequence i uses seed + i) or one for each sequence; None draws them from `generator`.
        generator: None for torch's default one, which torch.manual_seed sets.
        schedule: the image's grid, and the tokens its grammar forces, as vocabulary ids; None for as many free tokens
            as max_new_tokens allows.
        codes: vocabulary ids that may be drawn; None for the model's image tokens where there is a schedule and the
            model knows them, else for all.
    Returns: [B, P + N] token ids, or what return_dict_in_generate asks for, with `stats` of the decoder.
    Raises: ValueError, TypeError for what a window of drafts cannot honour.
    """
    from transformers.generation import GenerateDecoderOnlyOutput

    check_config(model, input_ids, generation_config)
    law = Law.of(logits_processor)
    sampled = generation_config.do_sample
    if not sampled and method not in (None, "jacobi"):
        raise ValueError(f"method: {method} samples; expected do_sample=True with it, got do_sample=False")
    batch_size, room = len(input_ids), generation_config.max_length - input_ids.shape[1]
    num_tokens = room if schedule is None else schedule.num_tokens
    if num_tokens > room:
        raise ValueError(f"max_new_tokens: expected at least the schedule's {num_tokens} tokens, got {room}")
    vocabulary = Vocabulary.of(model, schedule, codes)
    decoder = JacobiDecoder(
        batch_size=batch_size,
        num_tokens=num_tokens,
        vocab_size=len(vocabulary.codes),
        window_size=window_size,
        seeds=seeds_of(seed, generator, batch_size),
        method=method or ("maximal" if sampled else "jacobi"),
        params=law.params,
        schedule=None if schedule is None else schedule.of_codes(vocabulary.codes),
        init=init,
        reuse_threshold=reuse_threshold,
        device=input_ids.device,
    )
    sequences = Sequences(input_ids, decoder, vocabulary)

    def warped(logits: Tensor) -> Tensor:
        if law.processors is not None:
            logits = law.scores(logits, sequences.ids(), input_ids.shape[1] + decoder.num_committed)
        return logits[..., vocabulary.span]

    def end(before: Tensor, after: Tensor) -> None:
        sequences.end(stopping_criteria, before, after)

    decode(decoder, causal_rows(model, input_ids, law, vocabulary, model_kwargs), warped, end)
    drawn = sequences.padded(generation_config._pad_token_tensor)
    if not generation_config.return_dict_in_generate:
        return drawn
    out = GenerateDecoderOnlyOutput(sequences=drawn)
    out.stats = decoder.stats
    return out


@torch.no_grad()
def generate_image(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    params: SamplingParams | None = None,
    num_images_per_prompt: int = 1,
    method: str = "maximal",
    window_size: int = WINDOW_SIZE,
    init: str = INIT,
    reuse_threshold: float = 0.5,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What `model.generate(input_ids, generation_mode="image")` of a Janus model gives: image codes, for its
    `decode_image_tokens`.

    Args:
        model: JanusForConditionalGeneration.
        input_ids: [N, P] prompts that end with the token of an image's beginning, padded on the left.
        attention_mask: [N, P], 0 at padding; None where there is none.
        params: None for a guidance scale of 5, as the model has it.
        num_images_per_prompt: >= 1; images are ordered prompt by prompt.
        method, window_size, init, reuse_threshold, seed, generator: see `generate`.
    Returns: [N * num_images_per_prompt, T] int64.
    Raises: ValueError, TypeError for bad arguments.
    """
    if getattr(model.config, "model_type", None) != "janus":
        raise TypeError(f"model: expected JanusForConditionalGeneration, got {type(model).__name__}; see hf.generate")
    params = SamplingParams(guidance_scale=5.0) if params is None else params
    parts, config = model.model, model.generation_config
    input_ids = input_ids.repeat_interleave(num_images_per_prompt, 0)
    mask = torch.ones_like(input_ids)
    if attention_mask is not None:
        mask = attention_mask.repeat_interleave(num_images_per_prompt, 0)
    vision = parts.vision_model.config
    side = vision.image_size // vision.patch_size
    decoder = JacobiDecoder(
        batch_size=len(input_ids),
        num_tokens=side * side,
        vocab_size=parts.generation_embeddings.num_embeddings,
        window_size=window_size,
        seeds=seeds_of(seed, generator, len(input_ids)),
        method=method,
        params=params,
        schedule=Schedule(side, side),
        init=init,
        reuse_threshold=reuse_threshold,
        device=input_ids.device,
    )
    if decoder.guided:
        known = [config.bos_token_id, config.generation_kwargs["boi_token_id"]]
        kept = torch.isin(input_ids, torch.tensor(known, device=input_ids.device))
        input_ids = torch.cat((input_ids, input_ids.where(kept, config.pad_token_id)))
        mask = mask.repeat(2, 1)
    context = model.get_input_embeddings()(input_ids)

    def embed(ids: Tensor) -> dict[str, Tensor]:
        embeddings = model.prepare_embeddings_for_image_generation(ids.clamp_min(0))
        return {"inputs_embeds": torch.where((ids < 0)[..., None], context[:, -1:], embeddings)}

    def forward(**inputs: Any) -> Tensor:
        return parts.generation_head(parts.language_model(use_cache=True, **inputs).last_hidden_state)

    rows = CachedRows(forward, embed, mask, prompt_positions(mask), num_copies=2 if decoder.guided else 1)
    rows.prefill(inputs_embeds=context[:, :-1])
    decode(decoder, rows)
    return decoder.token_ids


def decode(
    decoder: JacobiDecoder,
    rows: CachedRows,
    warped: Callable[[Tensor], Tensor] | None = None,
    stop: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Run `decoder` to its end.

    Args:
        rows: the model, whose cache holds the prompts but for their last tokens.
        warped: what becomes of the logits of a pass before they are verified.
        stop: called after each pass with [B] tokens before and after it; may end rows.
    """
    while not decoder.done:
        before = decoder.num_committed
        ids, positions = decoder.window()
        # The model may have no position for slots past the image's end.
        logits = rows.logits(ids, positions.clamp_max(decoder.num_tokens - 1))
        after = decoder.verify(logits if warped is None else warped(logits)).num_committed
        rows.keep(after - before)
        if stop is not None:
            stop(before, after)


def causal_rows(
    model: Any, input_ids: Tensor, law: "Law", vocabulary: "Vocabulary", model_kwargs: dict[str, Any]
) -> CachedRows:
    """The model over the prompts, conditional ones first, and its cache filled with them but for their last tokens."""
    more = {name: value for name, value in model_kwargs.items() if name not in PREPARED and value is not None}
    if more.get("mm_encoder_outputs") == {}:  # what transformers leaves there without images
        del more["mm_encoder_outputs"]
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    positions = model_kwargs.get("position_ids")
    if law.scale is not None:
        if more:
            raise ValueError(f"guidance_scale: expected prompts of text alone with guidance, got {', '.join(more)}")
        input_ids, mask = with_unconditional(input_ids, mask, *law.unconditional(input_ids))
        positions = None
    behind = None
    if model.config.model_type == "glm_image":  # positions in three dimensions, the image's by its grid
        positions, behind = glm_image_positions(model, input_ids, mask, more)
    positions = prompt_positions(mask) if positions is None else positions

    def embed(ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": torch.where(ids < 0, input_ids[:, -1:], vocabulary.ids(ids))}

    # Chameleon's own forward forbids image tokens; without a schedule that is what its users get here, too.
    masked = model.config.model_type == "chameleon" and vocabulary.is_cut

    def forward(**inputs: Any) -> Tensor:
        inputs["use_cache"] = True
        return model.lm_head(model.model(**inputs)[0]) if masked else model(**inputs).logits

    cache = check_cache(model_kwargs.get("past_key_values"))
    rows = CachedRows(forward, embed, mask, positions, behind, cache, num_copies=1 if law.scale is None else 2)
    if "logits_to_keep" in model_kwargs and not masked:
        more["logits_to_keep"] = 1
    rows.prefill(input_ids=input_ids[:, :-1], **more)
    return rows


def with_unconditional(
    input_ids: Tensor, mask: Tensor, unconditional: Tensor, unconditional_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(ids, mask) of the prompts and, below them, of the unconditional ones, padded on the left to one length."""
    width = max(input_ids.shape[1], unconditional.shape[1])

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0))

    return (
        torch.cat((padded(input_ids), padded(unconditional))),
        torch.cat((padded(mask), padded(unconditional_mask))),
    )


def glm_image_positions(
    model: Any, input_ids: Tensor, mask: Tensor, more: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """([3, R, P] positions of the prompts, [3, R, N] those of the tokens behind them), None without a grid."""
    if more.get("image_grid_thw") is None:
        return None, None
    grids = {name: more.get(name) for name in ("image_grid_thw", "images_per_sample")}
    positions, _ = model.model.get_rope_index(input_ids, attention_mask=mask, **grids)
    return positions, model.model._cached_decode_position_ids.transpose(0, 1)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a decoder draws among those of a model: `codes`, which the decoder counts from 0. Others, which a
    schedule forces, it counts behind them, see `Schedule.of_codes`.

    is_cut: `codes` are not the whole head.
    """

    codes: range
    is_cut: bool

    @classmethod
    def of(cls, model: Any, schedule: Schedule | None, codes: range | None) -> "Vocabulary":
        size = model.get_output_embeddings().weight.shape[0]
        if codes is None:
            codes = (None if schedule is None else image_tokens(model)) or range(size)
        if not isinstance(codes, range) or codes.step != 1 or not 0 <= codes.start < codes.stop <= size:
            raise ValueError(
                f"codes: expected a range of ids below {size}, the rows of the model's head, got {codes!r}"
            )
        return cls(codes, codes != range(size))

    @property
    def span(self) -> slice:
        """The columns of the model's logits."""
        return slice(self.codes.start, self.codes.stop)

    def ids(self, tokens: Tensor) -> Tensor:
        """The decoder's tokens as vocabulary ids."""
        return torch.where(tokens < len(self.codes), tokens + self.codes.start, tokens - len(self.codes))


def image_tokens(model: Any) -> range | None:
    """The vocabulary ids of image codes where a model knows them, and they follow each other."""
    if model.config.model_type == "glm_image":
        return range(model.config.vq_config.num_embeddings)
    mapping = getattr(model.base_model, "vocabulary_mapping", None)
    tokens = [] if mapping is None else mapping.image_tokens
    found = range(tokens[0], tokens[-1] + 1) if tokens else range(0)
    return found if list(found) == tokens and tokens else None


class Sequences:
    """Prompts, and behind them what a decoder draws, as vocabulary ids.

    Args:
        prompts: [B, P].
    """

    def __init__(self, prompts: Tensor, decoder: JacobiDecoder, vocabulary: Vocabulary):
        self._prompts, self._decoder, self._vocabulary = prompts, decoder, vocabulary
        self._lengths = [decoder.num_tokens] * len(prompts)

    def ids(self) -> Tensor:
        """[B, P + T]: prompts, committed tokens, drafts, and ids without meaning."""
        return torch.cat((self._prompts, self._vocabulary.ids(self._decoder.draft_ids)), 1)

    def end(self, criteria: Callable[..., Tensor], before: Tensor, after: Tensor) -> None:
        """End the sequences that meet one of transformers' criteria at a token of the last pass; see `decode`."""
        ids, first = self.ids(), self._prompts.shape[1] + 1
        for row, (start, stop) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):  # sync: who has ended
            met = (n for n in range(start, stop) if criteria(ids[row : row + 1, : first + n], None).all())
            last = next(met, None)
            if last is not None:
                self._decoder.end(row)
                self._lengths[row] = last + 1

    def padded(self, padding: Tensor | None) -> Tensor:
        """[B, P + N]: the ids of the longest of them, and `padding` behind the others; None for 0."""
        ids = self.ids()[:, : self._prompts.shape[1] + max(self._lengths)]
        for row, length in enumerate(self._lengths):
            ids[row, self._prompts.shape[1] + length :] = 0 if padding is None else padding
        return ids


class Law:
    """From the logits of a pass to those that the decoder verifies.

    Attributes:
        guidance: the processor of classifier-free guidance, which this replaces; None without guidance.
        scale: its scale.
        params: what the decoder applies by itself: guidance, temperature, top-k and top-p, where nothing else is asked.
        processors: None then; else all but guidance, called row by row, each with the tokens before the row.
    """

    def __init__(self, guidance: Any, params: SamplingParams, processors: Sequence[Any] | None):
        self.guidance, self.params, self.processors = guidance, params, processors
        self.scale = None if guidance is None else guidance.guidance_scale

    @classmethod
    def of(cls, processors: Sequence[Any]) -> "Law":
        """Raises: ValueError for a processor that cannot be applied to a row by itself."""
        from transformers.generation import logits_process as known

        refused = next((p for p in processors if type(p).__name__ in STATEFUL), None)
        if refused is not None:
            raise ValueError(f"logits_processor: {type(refused).__name__} cannot be applied to drafts; leave it out")
        guidance = processors[0] if processors else None
        if not isinstance(guidance, known.UnbatchedClassifierFreeGuidanceLogitsProcessor):
            guidance = None
        rest = list(processors[0 if guidance is None else 1 :])
        if any(isinstance(p, known.UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in rest):
            raise ValueError("logits_processor: expected guidance before all others, and once; pass guidance_scale")
        warpers = {
            known.TemperatureLogitsWarper: "temperature",
            known.TopKLogitsWarper: "top_k",
            known.TopPLogitsWarper: "top_p",
        }
        names = [warpers.get(type(p), "") for p in rest]
        scale = 1.0 if guidance is None else guidance.guidance_scale
        in_order = names == [name for name in warpers.values() if name in names]
        if not in_order or scale < 1 or any(getattr(p, "min_tokens_to_keep", 1) > 1 for p in rest):
            return cls(guidance, SamplingParams(), rest)
        values = {name: getattr(p, name) for name, p in zip(names, rest, strict=True)}
        return cls(guidance, SamplingParams(guidance_scale=scale, **values), None)

    def unconditional(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, mask) of the unconditional prompts: the negative ones that the processor holds, or as it does without,
        the last token of each prompt."""
        held = self.guidance.unconditional_context
        ids = input_ids[:, -1:] if held["input_ids"] is None else held["input_ids"].to(input_ids.device)
        mask = torch.ones_like(ids) if held["attention_mask"] is None else held["attention_mask"].to(input_ids.device)
        if len(input_ids) % len(ids):
            raise ValueError(f"negative_prompt_ids: expected {len(input_ids)} rows, as of prompts, got {len(ids)}")
        copies = len(input_ids) // len(ids)  # num_return_sequences
        return ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)

    def scores(self, logits: Tensor, sequences: Tensor, lengths: Tensor) -> Tensor:
        """What the processors make of the logits of a pass, [B, W, V].

        Args:
            logits: [B, W, V], or [2, B, W, V] with guidance.
            sequences: [B, P + T] prompts, tokens and drafts.
            lengths: [B] tokens before the first slot of each row.
        """
        assert self.processors is not None
        scores = logits.float()
        if self.scale is not None:
            conditional, unconditional = scores.log_softmax(-1)
            scores = self.scale * (conditional - unconditional) + unconditional
        out = scores.clone()
        for row, length in enumerate(lengths.tolist()):  # sync: processors want prefixes
            for slot in range(min(scores.shape[1], sequences.shape[1] - length)):
                # As often as there are rows, since a processor may know each of them by its place.
                prefix = sequences[row : row + 1, : length + slot].repeat(len(scores), 1)
                mine = scores[row, slot].repeat(len(scores), 1)
                for processor in self.processors:
                    mine = processor(prefix, mine)
                out[row, slot] = mine[row]
        return out


def check_config(model: Any, input_ids: Tensor, config: Any) -> None:
    """Raises: ValueError for what a window of drafts cannot honour."""
    if model.config.is_encoder_decoder or not input_ids.shape[1]:
        raise ValueError("inputs: expected input_ids, at least one token of each, of a decoder-only model")
    if config.num_beams > 1:
        raise ValueError(f"num_beams: expected 1, got {config.num_beams}")
    if not config.use_cache:
        raise ValueError("use_cache: expected True, got False")
    asked = [name for name in NOT_KEPT if getattr(config, name)]
    if asked:
        raise ValueError(f"{asked[0]}: a pass computes them for drafts, too, and none are kept; leave it out")


def seeds_of(seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int) -> list[int]:
    """One for each sequence. Raises: ValueError, TypeError."""
    if seed is not None:
        if generator is not None:
            raise ValueError("seed, generator: expected one of them, got both")
        return seed_list(seed, count)
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=generator, device=device).tolist()
