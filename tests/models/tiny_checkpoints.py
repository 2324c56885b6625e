"""Tiny random checkpoints in every published layout, and what is known about them without the engine."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from sjd_engine.models import emu3, load_model, simplear
from sjd_engine.models.base import ImageModel
from sjd_engine.models.detokenizers.conv import ConvConfig
from sjd_engine.models.detokenizers.cosmos import CosmosDecoder
from sjd_engine.models.detokenizers.vqgan import VQGANConfig, VQGANDecoder

transformers = pytest.importorskip("transformers")

PROMPT = "A cat"
CODES = 32
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@dataclass
class Tiny:
    """A checkpoint on disk, and what is known about it without the engine.

    logits: (context, tokens) -> [V] reference logits of the next image code, tokens as schedules have them.
    conditional, unconditional: contexts for `logits`; where they are lists, the ids that the engine must build.
    forced: position -> token of the tiny image's grammar.
    """

    path: Path
    logits: Callable[[object, list[int]], Tensor]
    conditional: object
    unconditional: object
    shape: tuple[int, int]
    size: tuple[int, int]
    forced: dict[int, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.shape) + len(self.forced)

    def load(self) -> ImageModel:
        return load_model(self.path, torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------------------------- parts of a checkpoint


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Norms around 1, biases and matrices with spread: defaults of 1 and 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name and not name.endswith("bias")
        parameter.data = 1 + 0.2 * noise if norm else (0.5 if "embed" in name else 0.15) * noise
    return module.eval().requires_grad_(False)


def write_tokenizer(path: Path, names: list[str], end: str | None = None) -> dict[str, int]:
    """A byte-level tokenizer whose ids are places in `names`: letters are tokens, and so are longer names.

    end: token that the file adds behind every text.
    """
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([name for name in names if len(name) > 1])
    if end is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return vocabulary


def spell(vocabulary: Mapping[str, int], text: str) -> list[int]:
    letters = {32: "Ġ", 10: "Ċ"}
    return [vocabulary[letters.get(byte, chr(byte))] for byte in text.encode()]


def vqgan(attention: bool, blocks: bool) -> dict[str, Tensor]:
    """A VQGAN decoder of 16 pixels a code, with a tensor of its encoder.

    blocks: LlamaGen's names in place of taming-transformers'.
    """
    levels = 5
    config = ConvConfig(8, (32,) * levels, 3, (levels - 1,) if attention else ())
    state = randomise(VQGANDecoder(VQGANConfig(CODES, 8, config)), 1).state_dict()
    tensors = {}
    for name, tensor in state.items():
        if re.search(r"\.(q|k|v|proj_out)\.weight$", name):
            tensor = tensor[..., None, None]
        if blocks:
            for i, layer in enumerate(("block_1", "attn_1", "block_2")):
                name = name.replace(f"mid.{layer}.", f"mid.{i}.")
            name = re.sub(r"up\.(\d)\.", lambda found: f"conv_blocks.{levels - 1 - int(found[1])}.", name)
            name = name.replace(".block.", ".res.")
        tensors[name] = tensor.contiguous()
    return {**tensors, "encoder.conv_in.weight": torch.ones(3)}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(value))


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return contiguous(out)


def line_breaks(rows: int, cols: int, token: int, *end: int) -> dict[int, int]:
    forced = {row * (cols + 1) + cols: token for row in range(rows)}
    return {**forced, **{rows * (cols + 1) + i: token for i, token in enumerate(end)}}


# -------------------------------------------------------------------------------------------------------- the families


def image_name(code: int) -> str:
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


CHAMELEON_NAMES = [
    *("<s>", "<pad>", "</s>"),
    *(image_name(code) for code in range(CODES)),
    *("<eoss>", "<racm3:break>"),
    *ALPHABET,
    *(f"<reserved{number:05d}>" for number in (8706, 8799, 8801, 8802)),
]


def chameleon(swin: bool = False, groups: int | None = None, kv_heads: int = 4):
    """(config, model, head): `groups` heads in a row have the same QK-norm."""
    config = transformers.ChameleonConfig(
        **SIZES,
        num_key_value_heads=kv_heads,
        vocab_size=len(CHAMELEON_NAMES),
        max_position_embeddings=160,
        swin_norm=swin,
        vocabulary_map={"<image>": 1, **{image_name(code): 3 + code for code in range(CODES)}},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "embed_dim": 8, "num_embeddings": CODES},
    )
    model = randomise(transformers.ChameleonModel(config))
    if groups is not None:
        for layer in model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                for parameter in norm.parameters():
                    parameter.data = parameter[:: len(parameter) // groups].repeat_interleave(
                        len(parameter) // groups, 0
                    )
    head = 0.3 * torch.randn(config.vocab_size, 64, generator=torch.Generator().manual_seed(4))
    return config, model, head


def chameleon_logits(model, head: Tensor, first: int):
    def logits(context: list[int], tokens: list[int]) -> Tensor:
        ids = context + [token + first if token < CODES else token - CODES for token in tokens]
        return head[first : first + CODES] @ model(torch.tensor([ids])).last_hidden_state[0, -1]

    return logits


def lumina_checkpoint(folder: Path, swin: bool) -> Tiny:
    """Two shards, QK-norms of groups of heads, Meta's tokenizer folder."""
    folder = folder / "Lumina-mGPT-7B-64"
    config, model, head = chameleon(swin, groups=2, kv_heads=2 if swin else 4)
    config.save_pretrained(folder)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items() if "vqmodel" not in name}
    for name, tensor in tensors.items():
        if re.search(r"[qk]_norm", name):
            tensors[name] = tensor[:: len(tensor) // 2]
    tensors["lm_head.weight"] = head
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file(contiguous({name: tensors[name] for name in held}), folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    write_json(folder / "model.safetensors.index.json", index)
    ids = write_tokenizer(folder / "tokenizer" / "text_tokenizer.json", CHAMELEON_NAMES)
    torch.save({"state_dict": vqgan(False, False)}, folder / "tokenizer" / "vqgan.ckpt")
    image = [ids["<racm3:break>"], ids["<reserved08801>"], ids["<reserved08802>"]]
    size = (32, 64)
    text = f"Generate an image of 64x32 according to the following prompt:\n{PROMPT}"
    separator = ids["<reserved08706>"]
    return Tiny(
        folder,
        chameleon_logits(model, head, ids[image_name(0)]),
        [ids["<s>"], *spell(ids, text), separator, *image],
        image,
        (2, 4),
        size,
        line_breaks(2, 4, *(CODES + ids[name] for name in ("<reserved08799>", "<eoss>", "<reserved08706>"))),
    )


def anole_prompts(ids: Mapping[str, int]) -> tuple[list[int], list[int]]:
    conditional = [ids["<s>"], *spell(ids, PROMPT), ids["<reserved08706>"], ids["<racm3:break>"]]
    return conditional, [ids["<s>"], ids["<racm3:break>"]]


def anole_hf_checkpoint(folder: Path) -> Tiny:
    """With the decoder of images among the weights."""
    config, model, head = chameleon()
    config.save_pretrained(folder)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items() if "vqmodel" not in name}
    tensors |= {f"model.vqmodel.{name}": t for name, t in vqgan(False, False).items()}
    save_file(contiguous({**tensors, "lm_head.weight": head}), folder / "model.safetensors")
    ids = write_tokenizer(folder / "tokenizer.json", CHAMELEON_NAMES)
    logits = chameleon_logits(model, head, ids[image_name(0)])
    return Tiny(folder, logits, *anole_prompts(ids), (4, 4), (64, 64), {16: CODES + ids["<eoss>"]})


def anole_meta_checkpoint(folder: Path) -> Tiny:
    """Rotary pairs beside each other, one QK-norm for all heads."""
    _, model, head = chameleon(groups=1)

    def neighbours(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)

    tensors = {"lm_head.weight": head, "rope.freqs": torch.ones(8)}
    for name, tensor in model.state_dict().items():
        if re.search(r"[qk]_norm", name):
            tensors[name] = neighbours(tensor[0])
        elif "vqmodel" not in name:
            tensors[name] = neighbours(tensor) if re.search(r"[qk]_proj", name) else tensor
    tensors = renamed(
        tensors,
        (r"^embed_tokens", "tok_embeddings"),
        (r"^lm_head", "output"),
        (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
        (r"self_attn\.([qk])_norm", r"attention.\1_normalization"),
        (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.down_proj", "feed_forward.w2"),
        (r"mlp\.up_proj", "feed_forward.w3"),
        (r"post_attention_layernorm", "ffn_norm"),
        (r"input_layernorm", "attention_norm"),
    )
    inside = folder / "models" / "7b"
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": len(CHAMELEON_NAMES)}
    write_json(inside / "params.json", {"model": params})
    torch.save(tensors, inside / "consolidated.pth")
    ids = write_tokenizer(folder / "tokenizer" / "text_tokenizer.json", CHAMELEON_NAMES)
    torch.save({"state_dict": vqgan(False, False)}, folder / "tokenizer" / "vqgan.ckpt")
    logits = chameleon_logits(model, head, ids[image_name(0)])
    return Tiny(folder, logits, *anole_prompts(ids), (4, 4), (64, 64), {16: CODES + ids["<eoss>"]})


def janus_checkpoint(folder: Path, official: bool) -> Tiny:
    names = ["<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", *ALPHABET, "<begin_of_image>"]
    names += [] if official else ["<|User|>", "<|Assistant|>"]
    ids = write_tokenizer(folder / "tokenizer.json", names)
    text = {**SIZES, "num_key_value_heads": 4, "vocab_size": len(names) + 3, "max_position_embeddings": 128}
    config = transformers.JanusConfig(
        text_config={"model_type": "llama", **text},
        vision_config={
            **SIZES,
            **{"image_size": 64, "patch_size": 16, "num_image_tokens": 16, "projection_dim": 64},
            "hidden_dropout_rate": 0.0,
        },
        vq_config={
            **{"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 8, "base_channels": 32},
            **{"channel_multiplier": [1, 1, 1, 1, 1], "projection_dim": 64, "image_token_embed_dim": 64},
        },
    )
    whole = randomise(transformers.JanusForConditionalGeneration(config))
    model = whole.model
    if official:
        table = (
            (r"^lm_head", "language_model.lm_head"),
            (r"^model\.language_model", "language_model.model"),
            (r"^model\.generation_embeddings", "gen_embed"),
            (r"^model\.generation_aligner\.fc1", "gen_aligner.layers.0"),
            (r"^model\.generation_aligner\.hidden_layers\.0", "gen_aligner.layers.2"),
            (r"^model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
            (r"^model\.generation_head", "gen_head"),
            (r"^model\.(aligner|vision_model)", r"\1"),
        )
        tensors = {name: t for name, t in whole.state_dict().items() if "vqmodel" not in name}
        tensors = renamed(tensors, *table)
        tensors |= {f"gen_vision_model.{name}": tensor for name, tensor in vqgan(True, True).items()}
        torch.save(tensors, folder / "pytorch_model.bin")
        write_json(
            folder / "config.json",
            {
                "architectures": ["MultiModalityCausalLM"],
                "model_type": "multi_modality",
                "language_config": {"model_type": "llama", **text},
                "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 64}},
                "gen_head_config": {"params": {"image_token_embed": 64, "image_token_size": CODES, "n_embed": 64}},
            },
        )
    else:
        whole.save_pretrained(folder)
    user, assistant = ("User", "Assistant") if official else ("<|User|>", "<|Assistant|>")

    def word(name: str) -> list[int]:
        return spell(ids, name) if official else [ids[name]]

    inside = [*word(user), *spell(ids, f": {PROMPT}\n\n"), *word(assistant), *spell(ids, ":")]
    begin, image, padding = (ids[name] for name in ("<｜begin▁of▁sentence｜>", "<begin_of_image>", "<｜▁pad▁｜>"))

    def logits(context: list[int], tokens: list[int]) -> Tensor:
        x = model.get_input_embeddings()(torch.tensor([context]))
        if tokens:
            codes = model.generation_aligner(model.generation_embeddings(torch.tensor([tokens])))
            x = torch.cat((x, codes), 1)
        return model.generation_head(model.language_model(inputs_embeds=x).last_hidden_state)[0, -1]

    unconditional = [begin, *[padding] * len(inside), image]
    return Tiny(folder, logits, [begin, *inside, image], unconditional, (4, 4), (64, 64))


def simplear_checkpoint(folder: Path, tied: bool = True) -> Tiny:
    folder = folder / "SimpleAR-0.5B-RL"
    names = [*ALPHABET, "<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]
    config = transformers.Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        vocab_size=len(names) + 64000,
        max_position_embeddings=256,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        architectures=["SimpARForCausalLM"],
    )
    model = randomise(transformers.Qwen2ForCausalLM(config))
    model.save_pretrained(folder)
    ids = write_tokenizer(folder / "tokenizer.json", names)
    save_file(
        randomise(CosmosDecoder(ConvConfig(6, (8, 8, 8), 3, (2,), 48, 1, temporal=True)), 1).state_dict(),
        folder / "cosmos.safetensors",
    )
    first = len(names)

    def logits(context: list[int], tokens: list[int]) -> Tensor:
        return model(torch.tensor([context + [first + token for token in tokens]])).logits[0, -1, first:]

    def prompt(text: str) -> list[int]:
        return [ids["<|t2i|>"], *spell(ids, text), ids["<|soi|>"]]

    contexts = prompt(f"A highly realistic image of {PROMPT}"), prompt(simplear.NEGATIVE)
    return Tiny(folder, logits, *contexts, (4, 4), (64, 64))


def emu3_checkpoint(folder: Path, layout: str) -> Tiny:
    names = [
        *ALPHABET,
        *(f"<|extra_{number}|>" for number in range(200, 205)),
        *("<|image token|>", "<|image start|>", "<|image end|>"),
        *(f"<|visual token {code:06d}|>" for code in range(CODES)),
    ]
    ids = write_tokenizer(folder / "tokenizer.json", names)
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": len(names), "max_position_embeddings": 400}
    text |= {"pad_token_id": 0}
    config = transformers.Emu3Config(
        text_config=text,
        vq_config={
            **{"base_channels": 32, "channel_multiplier": [1, 1, 2], "hidden_size": 64, "attn_resolutions": []},
            **{"codebook_size": CODES, "num_res_blocks": 1},
        },
        vocabulary_map={
            "<image>": ids["<|image token|>"],
            **{n: i for n, i in ids.items() if n.startswith("<|visual")},
        },
    )
    model = randomise(transformers.Emu3ForCausalLM(config.text_config))
    pixels = randomise(transformers.Emu3VQVAE(config.vq_config), 1)
    if layout == "official":
        write_json(folder / "config.json", {"model_type": "Emu3", "rope_theta": 1e6, **text})
        save_file(contiguous(model.state_dict()), folder / "model.safetensors")
        (folder / "vision_tokenizer").mkdir()
        save_file(contiguous(pixels.state_dict()), folder / "vision_tokenizer" / "model.safetensors")
    else:
        config.save_pretrained(folder)
        stored = layout == "hf"
        text_names = (r"^", "text_model.") if stored else (r"^model\.", "model.text_model.")
        tensors = renamed(model.state_dict(), text_names)
        tensors |= renamed(pixels.state_dict(), (r"^", "vqmodel." if stored else "model.vqmodel."))
        save_file(tensors, folder / "model.safetensors")
    first = ids["<|visual token 000000|>"]

    def logits(context: list[int], tokens: list[int]) -> Tensor:
        tail = [token + first if token < CODES else token - CODES for token in tokens]
        return model(torch.tensor([context + tail])).logits[0, -1, first : first + CODES]

    def prompt(text: str) -> list[int]:
        start, image = ids["<|image start|>"], ids["<|image token|>"]
        return [ids["<|extra_203|>"], *spell(ids, text), start, *spell(ids, "3*5"), image]

    end = ("<|extra_200|>", "<|extra_201|>", "<|image end|>", "<|extra_204|>")
    return Tiny(
        folder,
        logits,
        prompt(f"{PROMPT} masterpiece, film grained, best quality."),
        prompt(emu3.NEGATIVE),
        (3, 5),
        (12, 20),
        line_breaks(3, 5, *(CODES + ids[name] for name in end)),
    )


def llamagen_forward(t: Mapping[str, Tensor], x: Tensor, first: int, num_conditioning: int, head_dim: int) -> Tensor:
    """Logits of the last of the vectors x [N, hidden] at positions first, first + 1, ..., one operation at a time.

    A pair of neighbouring entries is a complex number; image token i is turned by its row and its column.
    """
    heads = x.shape[1] // head_dim
    cells = first + torch.arange(len(x)) - num_conditioning
    speeds = 10000.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = torch.cat((torch.outer(cells // 4, speeds), torch.outer(cells % 4, speeds)), 1)
    turns = torch.polar((cells >= 0).float()[:, None].expand_as(angles).contiguous(), angles)

    def norm(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(v: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(v.unflatten(-1, (-1, 2))) * turns[:, None]).flatten(2)

    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    for i in range(2):
        name = f"layers.{i}"
        h = norm(x, t[f"{name}.attention_norm.weight"]) @ t[f"{name}.attention.wqkv.weight"].T
        q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in h.chunk(3, -1))
        scores = torch.einsum("ihd,jhd->hij", turned(q), turned(k)) / math.sqrt(head_dim)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ t[f"{name}.attention.wo.weight"].T
        h = norm(x, t[f"{name}.ffn_norm.weight"])
        w1, w2, w3 = (t[f"{name}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x[-1], t["norm.weight"]) @ t["output.weight"].T


def llamagen_tensors(dim: int) -> dict[str, Tensor]:
    shapes = {"tok_embeddings.weight": (CODES, dim), "norm.weight": (dim,), "output.weight": (CODES, dim)}
    for i in range(2):
        layer = f"layers.{i}"
        shapes |= {
            f"{layer}.attention.wqkv.weight": (3 * dim, dim),
            f"{layer}.attention.wo.weight": (dim, dim),
            f"{layer}.attention_norm.weight": (dim,),
            f"{layer}.ffn_norm.weight": (dim,),
            f"{layer}.feed_forward.w1.weight": (96, dim),
            f"{layer}.feed_forward.w2.weight": (dim, 96),
            f"{layer}.feed_forward.w3.weight": (96, dim),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.2 * t if t.ndim == 1 else 0.15 * t for name, t in tensors.items()}


def llamagen_class_checkpoint(folder: Path, dim: int, head_dim: int) -> Tiny:
    """The weights beside an optimizer and the arguments of the script, as training leaves them."""
    from argparse import Namespace

    tensors = llamagen_tensors(dim)
    classes = torch.randn(1001, dim, generator=torch.Generator().manual_seed(5))
    tensors["cls_embedding.embedding_table.weight"] = classes
    torch.save({"model": tensors, "steps": 3, "args": Namespace(lr=0.1)}, folder / "c2i_B_64.pt")
    torch.save({"model": vqgan(True, True)}, folder / "vq_ds16_c2i.pt")

    def logits(context: list[int], tokens: list[int]) -> Tensor:
        x = torch.cat((classes[[context[0] - CODES]], tensors["tok_embeddings.weight"][tokens]))
        return llamagen_forward(tensors, x, 0, 1, head_dim)

    return Tiny(folder / "c2i_B_64.pt", logits, [CODES + 281], [CODES + 1000], (4, 4), (64, 64))


def llamagen_text_checkpoint(folder: Path) -> Tiny:
    tensors, generator = llamagen_tensors(256), torch.Generator().manual_seed(5)
    table = {"cap_proj.fc1.weight": (256, 24), "cap_proj.fc2.weight": (256, 256), "uncond_embedding": (9, 24)}
    for name, shape in table.items():
        tensors[f"cls_embedding.{name}"] = 0.2 * torch.randn(shape, generator=generator)
    torch.save(tensors, folder / "t2i_XL_stage1_64.pt")
    torch.save({"model": vqgan(True, True)}, folder / "vq_ds16_t2i.pt")
    names = ["<pad>", "</s>", *ALPHABET]
    ids = write_tokenizer(folder / "flan-t5-xl" / "tokenizer.json", names, end="</s>")
    config = transformers.T5Config(
        **{"vocab_size": len(names), "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        feed_forward_proj="gated-gelu",
    )
    encoder = randomise(transformers.T5EncoderModel(config))
    encoder.save_pretrained(folder / "flan-t5-xl")

    text = torch.tensor([[*spell(ids, PROMPT.lower()), ids["</s>"]]])
    padded = F.pad(encoder(text).last_hidden_state[0], (0, 0, 9 - text.shape[1], 0))

    def logits(context: str, tokens: list[int]) -> Tensor:
        vectors = padded if context == "text" else tensors["cls_embedding.uncond_embedding"]
        vectors = vectors[9 - text.shape[1] :]
        h = F.gelu(vectors @ tensors["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        h = h @ tensors["cls_embedding.cap_proj.fc2.weight"].T
        x = torch.cat((h, tensors["tok_embeddings.weight"][tokens]))
        return llamagen_forward(tensors, x, 9 - text.shape[1], 9, 64)

    return Tiny(folder / "t2i_XL_stage1_64.pt", logits, "text", "nothing", (4, 4), (64, 64))


CHECKPOINTS: dict[str, Callable[[Path], Tiny]] = {
    "lumina": lambda folder: lumina_checkpoint(folder, swin=False),
    "lumina-34b": lambda folder: lumina_checkpoint(folder, swin=True),
    "anole-hf": anole_hf_checkpoint,
    "anole-meta": anole_meta_checkpoint,
    "janus-official": lambda folder: janus_checkpoint(folder, official=True),
    "janus-hf": lambda folder: janus_checkpoint(folder, official=False),
    "simplear": simplear_checkpoint,
    "emu3-official": lambda folder: emu3_checkpoint(folder, "official"),
    "emu3-hf": lambda folder: emu3_checkpoint(folder, "hf"),
    "emu3-hf-5": lambda folder: emu3_checkpoint(folder, "hf-5"),
    "llamagen-class": lambda folder: llamagen_class_checkpoint(folder, 256, 64),
    "llamagen-3b": lambda folder: llamagen_class_checkpoint(folder, 80, 20),  # heads that are no power of 2
    "llamagen-text": llamagen_text_checkpoint,
}
