"""Models of transformers as they are: this engine's tokens for the same seed, transformers' own for greedy decoding."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import CHECKPOINTS, PROMPT, SIZES, randomise

from sjd_engine import CheckpointError, Engine, SamplingParams, Schedule, hf
from sjd_engine.hf_cache import CachedRows
from sjd_engine.models import anole, emu3, simplear
from sjd_engine.models.detokenizers.base import Detokenizer

transformers = pytest.importorskip("transformers")

CLASSES = {
    "emu3-hf-5": "Emu3ForConditionalGeneration",
    "anole-hf": "ChameleonForConditionalGeneration",
    "simplear": "Qwen2ForCausalLM",
    "janus-hf": "JanusForConditionalGeneration",
}
LAW = {"guidance_scale": 1.5, "temperature": 2.0, "top_k": 20, "top_p": 0.9}


@pytest.fixture(scope="module", params=CLASSES)
def case(request, tmp_path_factory):
    """A tiny checkpoint, transformers' own model of it, and this engine with that model's weights."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (anole, simplear):
            patch.setattr(module, "SIDE", 64)
        patch.setattr(emu3, "SIDE", 16)
        tiny = CHECKPOINTS[request.param](tmp_path_factory.mktemp(request.param))
        # The tiny files hold a decoder of images whose sizes are not those of the encoder in the config.
        load = getattr(transformers, CLASSES[request.param]).from_pretrained
        model = load(tiny.path, dtype=torch.float32, ignore_mismatched_sizes=True).eval()
        yield SimpleNamespace(name=request.param, tiny=tiny, model=model, engine=Engine(model))


def draw(case, copies: int, **arguments) -> torch.Tensor:
    """The image codes of transformers' model, whichever way leads to them."""
    model, tiny, ours = case.model, case.tiny, case.engine.model
    ids = torch.tensor([tiny.conditional])
    if case.name == "janus-hf":
        model.generation_config.update(bos_token_id=0, pad_token_id=1)
        model.generation_config.generation_kwargs = {"boi_token_id": tiny.conditional[-1]}
        return hf.generate_image(
            model, ids, params=SamplingParams(**LAW), num_images_per_prompt=copies, window_size=6, **arguments
        )
    schedule = ours.schedule(*tiny.size)
    known = case.name != "simplear"  # Qwen2 does not know which of its tokens are image codes
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        negative_prompt_ids=torch.tensor([tiny.unconditional]),
        do_sample=True,
        num_return_sequences=copies,
        max_new_tokens=tiny.num_tokens,
        custom_generate=hf.generate,
        schedule=Schedule(*tiny.shape, {place: token - ours.num_codes for place, token in schedule.forced.items()}),
        codes=None if known else range(ours.first_code, ours.first_code + ours.num_codes),
        window_size=6,
        **LAW,
        **arguments,
    )
    assert torch.equal(out[:, : ids.shape[1]], ids.expand(copies, -1))
    return out[:, ids.shape[1] :][:, schedule.image_positions] - ours.first_code


@pytest.mark.parametrize("method", ["exact", "maximal"])
def test_the_tokens_are_this_engines(case, method):
    height, width = case.tiny.size
    arguments = {"height": height, "width": width, "output_type": "codes", "progress": False, "window_size": 6, **LAW}
    ours = case.engine.generate(PROMPT, method=method, num_images_per_prompt=2, seed=7, **arguments).token_ids
    assert torch.equal(draw(case, 2, method=method, seed=7), ours)


def test_an_engine_from_a_loaded_model_is_that_from_its_files(case):
    theirs = case.tiny.load()
    for name, parameter in case.engine.model.transformer.named_parameters():
        assert torch.equal(parameter, theirs.transformer.get_parameter(name)), name
    codes = torch.zeros(1, *case.tiny.shape, dtype=torch.int64)
    assert torch.equal(case.engine.model.decode(codes), theirs.decode(codes))


# -------------------------------------------------------------------------------------- against transformers' own loop


@pytest.fixture(scope="module")
def qwen2():
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=50, max_position_embeddings=256)
    model = randomise(transformers.Qwen2ForCausalLM(config))
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def prompts():
    """Two prompts and two negative ones, of unequal lengths and padded on the left."""
    ids, negative = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 9]]), torch.tensor([[3, 4], [0, 9]])
    return {
        "inputs": ids,
        "attention_mask": (ids > 0).long(),
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": (negative > 0).long(),
        "max_new_tokens": 30,
        "do_sample": False,
    }


def allowed(batch_id: int, ids: torch.Tensor) -> list[int]:
    """A grammar that differs from prompt to prompt and from place to place."""
    return [7] if len(ids) % 5 == batch_id else list(range(10 + int(ids[-1]) % 3, 40))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"guidance_scale": 2.0},
        {"guidance_scale": 0.5},
        {"guidance_scale": 2.0, "negative_prompt_ids": None, "negative_prompt_attention_mask": None},
        {"guidance_scale": 2.0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": allowed},
        {"guidance_scale": 2.0, "eos_token_id": [21, 33, 48], "min_new_tokens": 3},
    ],
    ids=["plain", "guided", "weak", "last-token", "penalties", "grammar", "eos"],
)
def test_greedy_decoding_is_that_of_transformers(qwen2, prompts, more):
    arguments = {**prompts, **more}
    expected = qwen2.generate(**arguments)
    for window_size in (1, 7):
        ours = qwen2.generate(**arguments, custom_generate=hf.generate, window_size=window_size)
        assert torch.equal(ours, expected)


def test_the_last_window_stays_within_the_models_positions():
    config = transformers.GPT2Config(vocab_size=50, n_embd=64, n_head=4, n_layer=2, n_positions=20)
    model = randomise(transformers.GPT2LMHeadModel(config))
    arguments = {"inputs": torch.tensor([[3, 4, 5]]), "max_new_tokens": 17, "do_sample": False, "pad_token_id": 0}
    arguments |= {"attention_mask": torch.ones(1, 3, dtype=torch.int64), "eos_token_id": None}
    expected = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments, custom_generate=hf.generate, window_size=7), expected)


def test_glm_image_places_its_tokens_in_a_grid():
    if not hasattr(transformers, "GlmImageForConditionalGeneration"):
        pytest.skip("transformers has it since 5.0")
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": 80, "vision_vocab_size": 40, "pad_token_id": 79}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = transformers.GlmImageConfig(
        text_config={**text, "max_position_embeddings": 256, "eos_token_id": 33, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 8},
        vq_config={"embed_dim": 8, "num_embeddings": 32, "latent_channels": 32},
        image_token_id=70,
        image_start_token_id=32,
        image_end_token_id=33,
    )
    model = randomise(transformers.GlmImageForConditionalGeneration(config))
    ids = torch.tensor([[79, 79, 50, 51, 52, 32], [40, 41, 42, 43, 44, 32]])
    arguments = {
        "attention_mask": (ids != 79).long(),
        "image_grid_thw": torch.tensor([[1, 4, 5], [1, 2, 2]] * 2),
        "images_per_sample": torch.tensor([2, 2]),
        "max_new_tokens": 25,
        "pad_token_id": 79,
    }
    ours = partial(model.generate, ids, custom_generate=hf.generate, **arguments)
    expected = model.generate(ids, do_sample=False, **arguments)
    assert torch.equal(ours(do_sample=False, window_size=7), expected)
    images = [ours(do_sample=True, method=method, seed=5, schedule=Schedule(4, 5)) for method in ("ar", "exact")]
    assert torch.equal(*images)
    assert int(images[0][:, 6:].max()) < 32  # codes alone


# ------------------------------------------------------------------------------------------------ laws, seeds, batches


@pytest.fixture(scope="module")
def sample(qwen2, prompts):
    return partial(qwen2.generate, **{**prompts, "do_sample": True}, custom_generate=hf.generate, window_size=6)


def test_rows_advance_at_their_own_pace(sample, monkeypatch):
    """And a cache that kept rejected drafts in view would be noticed."""
    law = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": 9, "top_p": 0.9}
    expected = sample(**law, method="ar", seed=[4, 3])
    out = sample(**law, method="exact", seed=[4, 3], return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert len(set(out.stats.iterations)) == 2
    assert max(out.stats.iterations) < 30
    keep = CachedRows.keep

    def forgetful(rows: CachedRows, num_new: torch.Tensor) -> None:
        keep(rows, num_new)
        rows._mask = torch.ones_like(rows._mask)

    monkeypatch.setattr(CachedRows, "keep", forgetful)
    assert not torch.equal(sample(**law, method="exact", seed=[4, 3]), expected)


def test_processors_make_the_law_that_the_decoder_makes(sample):
    """`renormalize_logits` changes no law, but the decoder does not know it: all are applied row by row."""
    law = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": 9, "top_p": 0.9, "seed": 3}
    assert torch.equal(sample(**law), sample(**law, renormalize_logits=True))
    assert not torch.equal(sample(**law), sample(**law, min_p=0.3))


def test_seeds(sample):
    plain = {"top_k": 0}
    first = sample(**plain, seed=3)
    assert torch.equal(first, sample(**plain, seed=[3, 4]))
    assert not torch.equal(first, sample(**plain, seed=4))
    drawn = [sample(**plain, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    globally = []
    for _ in range(2):
        torch.manual_seed(5)
        globally.append(sample(**plain))
    assert torch.equal(*globally)


# ------------------------------------------------------------------------- an engine over modules of transformers


class Grey(Detokenizer):
    """A code is a square of one grey."""

    codebook_size, patch_size = 32, 2

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes / 16 - 1)[:, None].repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


PLAN = {"codes": range(3, 35), "schedule": Schedule.with_line_breaks(3, 4, 35, (36,))}


def attached(name: str, dtype: torch.dtype = torch.float32, **config) -> hf.AttachedModel:
    """A tiny random model of the class `name`, whose image codes are the ids 3 to 34."""
    sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}
    if name.startswith("GPT"):
        sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}
    kind = getattr(transformers, f"{name.removesuffix('LMHead')}Config")
    tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = getattr(transformers, name + ("Model" if name.endswith("LMHead") else "ForCausalLM"))
    model = randomise(model(kind(**sizes, **tokens, **config))).to(dtype)
    return hf.AttachedModel(model, encode=lambda text: [40, *map(len, text.split())], detokenizer=Grey(), **PLAN)


@pytest.mark.parametrize(
    ("name", "config"),
    [("Llama", {"head_dim": 20}), ("Qwen3", {"head_dim": 16}), ("GPT2LMHead", {})],
    ids=["heads-of-20", "qk-norm", "learnt-positions"],
)
def test_decoder_only_classes_run_over_the_paged_cache(name, config):
    ours = attached(name, **config)
    model = ours.transformer._model
    arguments = {"method": "exact", "window_size": 6, "guidance_scale": 1.5, "temperature": 1.5}
    out = Engine(ours).generate(["a red cat", "two"], seed=3, output_type="pt", progress=False, **arguments)
    assert out.images.shape == (2, 3, 6, 8)
    assert max(image.nfe for image in out.stats) < 16
    ids = torch.tensor([ours.build_prompt("a red cat", None, 6, 8).conditional.ids])
    theirs = model.generate(  # the same modules with their own attention and cache
        ids,
        attention_mask=torch.ones_like(ids),
        negative_prompt_ids=torch.tensor([[40]]),
        do_sample=True,
        top_k=0,
        max_new_tokens=16,
        custom_generate=hf.generate,
        seed=3,
        **PLAN,
        **arguments,
    )
    image = PLAN["schedule"].image_positions
    assert torch.equal(theirs[0, ids.shape[1] :][image] - 3, out.token_ids[0])


def test_a_model_in_bfloat16_is_attached():
    assert attached("Llama", torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Mistral", {"sliding_window": 4}, "MistralAttention: expected plain causal attention, got sliding_window"),
        ("Granite", {"logits_scaling": 4.0}, "GraniteForCausalLM: over paged attention its logits differ by"),
        ("GPTJ", {"rotary_dim": 8}, "GPTJForCausalLM: (its attention cannot be replaced|over paged attention)"),
    ],
    ids=["Mistral", "Granite", "GPTJ"],
)
def test_attention_or_heads_of_another_kind(name, config, message):
    with pytest.raises(CheckpointError, match=message):
        attached(name, **config)


def test_what_an_attached_model_cannot_do():
    ours = attached("Llama")
    with pytest.raises(ValueError, match="quantization, tensor_parallel: expected neither for an AttachedModel"):
        Engine(ours, quantization="int8")
    with pytest.raises(ValueError, match="height, width: LlamaForCausalLM draws 6x8 pixels, got 8x8"):
        Engine(ours).generate("a", height=8, width=8)
    model = ours.transformer._model
    with pytest.raises(ValueError, match=r"codes: expected a range of ids below 50, .* got range\(30, 62\)"):
        hf.AttachedModel(model, encode=list, codes=range(30, 62), schedule=PLAN["schedule"], detokenizer=Grey())
    model.name_or_path = "emoji"
    with pytest.raises(CheckpointError, match=r"no known model family; .*; see sjd_engine\.hf\.AttachedModel"):
        Engine(model)


# -------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_beams": 2, "do_sample": False}, "num_beams: expected 1, got 2"),
        ({"use_cache": False}, "use_cache: expected True, got False"),
        ({"cache_implementation": "static"}, "past_key_values: expected a DynamicCache .* got StaticCache"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: a pass computes them for drafts"),
        ({"do_sample": False, "method": "sjd"}, "method: sjd samples; expected do_sample=True with it"),
        ({"schedule": Schedule(6, 6)}, "max_new_tokens: expected at least the schedule's 36 tokens, got 30"),
        ({"codes": range(40, 60)}, r"codes: expected a range of ids below 50, .* got range\(40, 60\)"),
        ({"codes": [1, 2]}, r"codes: expected a range of ids below 50, .* got \[1, 2\]"),
        ({"seed": 1, "generator": torch.Generator()}, "seed, generator: expected one of them, got both"),
        ({"window_size": 0}, "window_size: expected >= 1, got 0"),
        (
            {"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(3, 2, dtype=torch.int64)},
            "negative_prompt_ids: expected 2 rows, as of prompts, got 3",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_window_cannot_honour(sample, more, message):
    with pytest.raises(ValueError, match=message):
        sample(**more)


def test_a_cache_in_use(qwen2, sample, prompts):
    cache = transformers.DynamicCache()
    qwen2(prompts["inputs"][:, :2], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values: expected an empty cache, got 2 tokens"):
        sample(past_key_values=cache)


def test_a_processor_that_remembers_its_calls(sample):
    from transformers.generation.logits_process import ClassifierFreeGuidanceLogitsProcessor

    with pytest.raises(ValueError, match="ClassifierFreeGuidanceLogitsProcessor cannot be applied to drafts"):
        sample(logits_processor=[ClassifierFreeGuidanceLogitsProcessor(2.0)])


def test_models_that_an_engine_cannot_take(qwen2):
    with pytest.raises(CheckpointError, match="Qwen2ForCausalLM was not loaded from a checkpoint"):
        Engine(qwen2)
    with pytest.raises(TypeError, match="model: expected JanusForConditionalGeneration, got Qwen2ForCausalLM"):
        hf.generate_image(qwen2, torch.ones(1, 2, dtype=torch.int64))
