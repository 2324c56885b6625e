"""Every family from tiny random checkpoints in the layouts it is published in, against transformers' modules or, for
LlamaGen, formulas: logits, windows with rollback, greedy and exact decoding, prompts."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_checkpoints import (
    CHAMELEON_NAMES,
    CHECKPOINTS,
    CODES,
    PROMPT,
    Tiny,
    anole_hf_checkpoint,
    anole_meta_checkpoint,
    line_breaks,
    llamagen_class_checkpoint,
    llamagen_text_checkpoint,
    lumina_checkpoint,
    simplear_checkpoint,
    write_json,
    write_tokenizer,
)
from typer.testing import CliRunner

from sjd_engine import CheckpointError, Engine
from sjd_engine.cli import app
from sjd_engine.models import anole, emu3, llamagen, load_model, simplear
from sjd_engine.models.base import Context, ImageModel
from sjd_engine.schedule import Schedule
from sjd_engine.testing import teacher_forced_logits


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tiny(request, tmp_path_factory):
    """(Tiny, its model) of every layout; models of tiny images where the size isn't in the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anole, "SIDE", 64)
        patch.setattr(simplear, "SIDE", 64)
        patch.setattr(emu3, "SIDE", 16)
        patch.setitem(llamagen.HEAD_DIMS, 80, 20)
        found = CHECKPOINTS[request.param](tmp_path_factory.mktemp(request.param))
        yield found, found.load()


def prompt_text(model: ImageModel) -> str:
    return "tabby" if isinstance(model, llamagen.LlamaGenModel) and not model.text_conditional else PROMPT


def contexts(case: Tiny, model: ImageModel) -> list[tuple[object, Context]]:
    prompt = model.build_prompt(prompt_text(model), None, *case.size)
    return [(case.conditional, prompt.conditional), (case.unconditional, prompt.unconditional)]


def random_tokens(case: Tiny) -> list[int]:
    free = torch.randint(0, CODES, (case.num_tokens,), generator=torch.Generator().manual_seed(7)).tolist()
    return [case.forced.get(position, token) for position, token in enumerate(free)]


def test_prompts_are_those_of_the_family(tiny):
    case, model = tiny
    for expected, context in contexts(case, model):
        if isinstance(expected, list):
            assert list(context.ids) == expected


def test_the_schedule_has_the_grammar(tiny):
    case, model = tiny
    schedule = model.schedule(*case.size)
    assert ((schedule.rows, schedule.cols), dict(schedule.forced)) == (case.shape, case.forced)


def test_logits_equal_the_reference(tiny):
    case, model = tiny
    tokens = random_tokens(case)
    for expected, context in contexts(case, model):
        logits = teacher_forced_logits(model, context, torch.tensor([tokens]))[0]
        for position in {0, 1, 5, len(tokens) - 1}:
            reference = case.logits(expected, tokens[:position])
            assert (logits[position] - reference).abs().max() <= 1e-5 * max(1, reference.abs().max())


def test_windows_with_rollback_equal_one_full_pass(tiny):
    """Both sequences of an image, random chunks, rejected tokens that are overwritten."""
    case, model = tiny
    tokens, generator = torch.tensor(random_tokens(case)), torch.Generator().manual_seed(2)
    for _, context in contexts(case, model):
        expected = teacher_forced_logits(model, context, tokens[None])[0]
        prefix = model.context_embeddings(context)[None]
        anchor = prefix[:, -1]
        cache = model.transformer.new_cache(1, len(context) + len(tokens) + 8)
        cache.first_positions += context.first_position
        if len(context) > 1:
            model.transformer(prefix[:, :-1], cache)
        cache.rollback(torch.tensor([len(context) - 1]))
        known = torch.cat((torch.tensor([-1]), tokens))
        done = 0
        while done < len(tokens):
            width = int(torch.randint(1, 7, (), generator=generator))
            kept = min(int(torch.randint(1, width + 1, (), generator=generator)), len(tokens) - done)
            window = torch.randint(0, CODES, (1, width), generator=generator)  # garbage past the kept tokens
            window[0, :kept] = known[done : done + kept]
            logits = model.transformer.logits(model.transformer(model.window_embeddings(window, anchor), cache))
            difference = (logits[0, :kept] - expected[done : done + kept]).abs().max()
            assert difference <= 2e-5 * max(1, expected.abs().max())
            done += kept
            cache.rollback(torch.tensor([len(context) - 1 + done]))


def test_greedy_decoding_equals_a_loop_without_a_cache(tiny):
    """With guidance and the grammar; Jacobi decoding in windows, and one token a pass."""
    case, model = tiny
    scale = model.defaults.params.guidance_scale
    tokens: list[int] = []
    for position in range(case.num_tokens):
        if position not in case.forced:
            conditional, unconditional = (case.logits(c, tokens) for c in (case.conditional, case.unconditional))
            tokens.append(int((unconditional + scale * (conditional - unconditional)).argmax()))
        else:
            tokens.append(case.forced[position])
    expected = [token for position, token in enumerate(tokens) if position not in case.forced]
    engine = Engine(model)
    arguments = {"height": case.size[0], "width": case.size[1], "output_type": "codes", "progress": False}
    for method, more in (("jacobi", {"window_size": 7}), ("ar", {"top_k": 1})):
        out = engine.generate(prompt_text(model), method=method, **arguments, **more)
        assert out.token_ids[0].tolist() == expected


def test_exact_draws_the_image_of_one_token_a_pass(tiny):
    case, model = tiny
    engine = Engine(model)
    arguments = {"height": case.size[0], "width": case.size[1], "output_type": "pt", "progress": False, "seed": [3, 4]}
    arguments |= {"guidance_scale": 1.5, "temperature": 2.0}  # a law that is not too sure
    ar, exact = (
        engine.generate([prompt_text(model)] * 2, method=method, window_size=6, **arguments)
        for method in ("ar", "exact")
    )
    assert torch.equal(ar.token_ids, exact.token_ids)
    assert torch.equal(ar.images, exact.images)
    assert ar.images.shape == (2, 3, *case.size)
    assert not torch.equal(ar.token_ids[0], ar.token_ids[1])


# ------------------------------------------------------------------------------------------ the grammar at real sizes


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Models of tiny weights that draw the families' real sizes, by layout."""

    def load(name: str, folder: str | None = None) -> ImageModel:
        path = CHECKPOINTS[name](tmp_path_factory.mktemp(name)).path
        return load_model(
            path if folder is None else path.rename(path.with_name(folder)), torch.device("cpu"), torch.float32
        )

    return load


@pytest.mark.parametrize(
    ("side", "num_sizes", "tallest"), [(512, 49, (1024, 256)), (768, 73, (1536, 384)), (1024, 97, (2048, 512))]
)
def test_lumina_breaks_every_line_of_every_size(full_size, side, num_sizes, tallest):
    model = full_size("lumina", f"Lumina-mGPT-7B-{side}")
    assert model.image_size == (side, side)
    assert len(model.sizes) == len(set(model.sizes)) == num_sizes
    assert max(model.sizes) == tallest
    token = {name: CODES + model.vocabulary.token(name) for name in ("<reserved08799>", "<eoss>", "<reserved08706>")}
    for height, width in model.sizes:
        assert height * width <= side * side
        assert max(height, width) <= 4 * min(height, width)
        schedule, line = model.schedule(height, width), width // 16 + 1
        assert schedule.num_tokens == height // 16 * line + 2
        ends = [t for t, token_id in schedule.forced.items() if token_id == token["<reserved08799>"]]
        assert ends == list(range(line - 1, height // 16 * line, line))
        assert [schedule.forced[schedule.num_tokens - i] for i in (2, 1)] == [token["<eoss>"], token["<reserved08706>"]]
    assert model.schedule(side, side).num_tokens == {512: 1056, 768: 2352, 1024: 4160}[side] + 2


def test_emu3_breaks_every_line_of_every_shape(full_size):
    model = full_size("emu3-hf")
    model.detokenizer.patch_size = 8
    model.sizes = emu3.shapes(720, 8)
    assert model.sizes[:2] == ((720, 720), (624, 832))
    ends = ("<|extra_200|>", "<|extra_201|>", "<|image end|>", "<|extra_204|>")
    tokens = [CODES + model.vocabulary.token(name) for name in ends]
    assert len(model.sizes) == len(set(model.sizes)) == 9
    for height, width in model.sizes:
        assert abs(height * width / 720**2 - 1) < 0.02
        schedule, shape = model.schedule(height, width), (height // 8, width // 8)
        assert (schedule.rows, schedule.cols) == shape
        assert dict(schedule.forced) == line_breaks(*shape, *tokens)
    assert model.schedule(720, 720).num_tokens == 8190 + 3


def test_families_of_one_size(full_size, monkeypatch):
    monkeypatch.setattr(anole, "SIDE", 512)
    monkeypatch.setattr(simplear, "SIDE", 1024)
    anole_model, simplear_model = full_size("anole-hf"), full_size("simplear")
    schedule = anole_model.schedule(512, 512)
    assert schedule.num_tokens == 1025
    assert dict(schedule.forced) == {1024: CODES + anole_model.image_end}
    assert simplear_model.schedule(1024, 1024).num_tokens == 4096
    for model in (anole_model, simplear_model):
        with pytest.raises(ValueError, match=rf"draws {model.image_size[0]}x{model.image_size[1]} pixels, got 8x8"):
            model.schedule(8, 8)


def test_families_without_forced_tokens(full_size, tmp_path):
    """Janus draws what it sees, LlamaGen what its file's name says."""
    path = CHECKPOINTS["janus-official"](tmp_path).path
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["params"]["image_size"] = 384
    write_json(path / "config.json", config)
    models = {24: load_model(path, torch.device("cpu"), torch.float32)}
    for name, file, rows in (
        ("llamagen-class", "c2i_B_256.pt", 16),
        ("llamagen-class", "c2i_L_384.pt", 24),
        ("llamagen-text", "t2i_XL_stage2_512.pt", 32),
    ):
        models[rows] = full_size(name, file)
        assert models[rows].image_size == (16 * rows, 16 * rows)
    for rows, model in models.items():
        schedule = model.schedule(*model.image_size)
        assert model.sizes == (model.image_size,)
        assert (schedule.rows, schedule.cols, dict(schedule.forced)) == (rows, rows, {})


def test_a_head_of_its_own_is_read(tmp_path, monkeypatch):
    """SimpleAR, should a checkpoint not tie its head to the embedding."""
    monkeypatch.setattr(simplear, "SIDE", 64)
    case = simplear_checkpoint(tmp_path, tied=False)
    test_logits_equal_the_reference((case, case.load()))


# ------------------------------------------------------------------------------------------------ what families refuse


def test_negative_prompts_where_the_family_has_them(tiny):
    case, model = tiny
    if isinstance(model, simplear.SimpleARModel | emu3.Emu3Model):
        prompt = model.build_prompt(PROMPT, "dog", *case.size)
        assert len(prompt.unconditional) < len(case.unconditional)
    else:
        with pytest.raises(ValueError, match=r"negative_prompt: .* has none"):
            model.build_prompt(prompt_text(model), "dog", *case.size)


def test_a_prompt_that_leaves_no_room_for_the_image(tiny):
    case, model = tiny
    if isinstance(model, llamagen.LlamaGenModel):
        pytest.skip("classes are one token, texts are cut")
    with pytest.raises(ValueError, match=r"prompt: expected at most \d+ tokens with those of the template, got \d+"):
        model.build_prompt("word " * 1000, None, *case.size)


def test_lumina_can_keep_the_separator_in_the_unconditional_context(tmp_path):
    case = lumina_checkpoint(tmp_path, swin=False)
    model = case.load()
    model.uncond = "sep_boi"
    prompt = model.build_prompt(PROMPT, None, *case.size)
    assert list(prompt.unconditional.ids) == [model.separator, *case.unconditional]
    model.uncond = "nothing"
    with pytest.raises(ValueError, match="uncond: expected one of boi, sep_boi, got 'nothing'"):
        model.build_prompt(PROMPT, None, *case.size)


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("c2i_B_64.pt", "cls_embedding.embedding_table.weight", "missing cls_embedding"),
        ("c2i_B_64.pt", "layers.1.feed_forward.w2.weight", r"missing layers\.1\.feed_forward\.w2"),
        ("c2i_B_64.pt", "layers.0.feed_forward.w1.weight", r"missing layers\.0\.feed_forward\.w1"),
        ("c2i_B.pt", None, "expected the size of its images in its name, as in c2i_B_256.pt"),
    ],
)
def test_a_damaged_file_of_llamagen(tmp_path, name, lost, message):
    path = llamagen_class_checkpoint(tmp_path, 256, 64).path
    tensors = torch.load(path, weights_only=False)["model"]
    torch.save({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / name, torch.device("cpu"), torch.float32)


class TestLlamaGenPrompts:
    @pytest.mark.parametrize(
        ("prompt", "number"), [("tench", 0), ("Tabby", 281), ("207", 207), ("Cardigan", 264), ("cardigan", 474)]
    )
    def test_a_class_by_name_or_number(self, prompt, number):
        assert llamagen.class_number(prompt, 1000) == number

    @pytest.mark.parametrize("prompt", ["a cat on a sofa", "1000", "-1"])
    def test_what_is_no_class(self, prompt):
        with pytest.raises(
            ValueError, match="prompt: expected a class of ImageNet, by name like 'goldfish' or by number"
        ):
            llamagen.class_number(prompt, 1000)

    def test_the_text_encoder_is_let_go_once_images_begin(self, tmp_path):
        case = llamagen_text_checkpoint(tmp_path)
        model = case.load()
        prompt = model.build_prompt("A  Cat &amp; a dog, cut", None, *case.size)
        assert len(prompt.conditional) == len(prompt.unconditional) == 9
        assert prompt.conditional.first_position == 0
        assert model.encoder._loaded is not None
        model.context_embeddings(prompt.conditional)
        assert model.encoder._loaded is None
        again = model.build_prompt("A  Cat &amp; a dog, cut", None, *case.size)
        assert model.encoder._loaded is None, "vectors are kept"
        assert torch.equal(again.conditional.embeddings, prompt.conditional.embeddings)


def test_a_converted_checkpoint_of_anole_has_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(anole, "SHARD_NUMEL", 20_000)
    case = anole_meta_checkpoint(tmp_path / "meta" / "..")
    converted = tmp_path / "converted"
    assert CliRunner().invoke(app, ["convert", "anole", str(case.path), str(converted)]).exit_code == 0
    assert len(list(converted.glob("model-*.safetensors"))) > 2
    ours = load_model(converted, torch.device("cpu"), torch.float32)
    assert type(ours) is anole.AnoleModel
    for name, parameter in case.load().transformer.named_parameters():
        assert torch.equal(parameter, ours.transformer.get_parameter(name)), name
    with pytest.raises(ValueError, match="output: expected a new folder"):
        anole.convert(case.path, converted)
    with pytest.raises(ValueError, match=r"source: expected a folder with models/7b/consolidated\.pth"):
        anole.convert(converted, tmp_path / "other")


def test_forced_tokens_cost_no_pass_where_drafts_around_them_are_accepted(tmp_path, monkeypatch):
    """A model that is sure of its code: once the drafts are right, a pass takes four lines and what ends the image."""
    case = lumina_checkpoint(tmp_path, swin=False)
    model = case.load()
    sure = 9 * F.one_hot(torch.tensor(3), CODES).float()
    monkeypatch.setattr(model.transformer, "logits", lambda hidden: sure.repeat(*hidden.shape[:-1], 1))
    passes = []
    for schedule in (model.schedule(64, 64), Schedule.line(22)):
        monkeypatch.setattr(model, "schedule", lambda height, width, schedule=schedule: schedule)
        arguments = {"height": 64, "width": 64, "output_type": "codes", "progress": False}
        out = Engine(model).generate(PROMPT, method="jacobi", window_size=22, **arguments)
        assert (out.token_ids == 3).all()
        assert (out.stats[0].num_tokens, out.token_ids.shape[1]) == (22, 22 - len(schedule.forced))
        passes.append(out.stats[0].nfe)
    assert passes == [2, 2]


def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(tmp_path):
    case = anole_hf_checkpoint(tmp_path)
    write_tokenizer(case.path / "tokenizer.json", [*CHAMELEON_NAMES, "<reserved09999>"])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected at most \d+ tokens, as config\.json has it"):
        case.load()


def test_what_belongs_beside_the_weights_is_named(tmp_path):
    case = lumina_checkpoint(tmp_path, swin=False)
    for name, remedy in (
        ("vqgan.ckpt", "no vqgan.ckpt; put the tokenizer"),
        ("text_tokenizer.json", "or tokenizer/text"),
    ):
        (case.path / "tokenizer" / name).unlink()
        with pytest.raises(CheckpointError, match=remedy):
            case.load()
