"""Speculative Jacobi decoding inside transformers' generate: its own model class, unpatched, draws an image.

    pip install 'sjd-engine[hf]' && python examples/embed_huggingface.py "a red apple" apple.png compare

The weights are those of the bundled model, which is a Qwen2 with image codes in its vocabulary.
"""

import sys
import time
from functools import partial

import torch
from transformers import Qwen2ForCausalLM

import sjd_engine
from sjd_engine.models import checkpoint_folder


def main(prompt: str = "a red apple", path: str = "apple.png", compare: str = "", **arguments) -> torch.Tensor:
    """Draw `prompt` and save the image; returns its codes [1, T]. `arguments` are those of `sjd_engine.hf.generate`.

    compare: anything draws again with transformers' own loop, for the seconds.
    """
    model = Qwen2ForCausalLM.from_pretrained(checkpoint_folder("emoji"), dtype=torch.float32).eval()
    ours = sjd_engine.Engine(model).model  # the same weights in the engine: its tokenizer and detokenizer are used here
    text = ours.build_prompt(prompt, None, *ours.image_size)
    ids, negative = (torch.tensor([context.ids]) for context in (text.conditional, text.unconditional))
    schedule = ours.schedule(*ours.image_size)
    draw = partial(
        model.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        negative_prompt_ids=negative,
        guidance_scale=2.0,
        do_sample=True,
        top_k=0,  # transformers would keep the 50 most likely tokens
        max_new_tokens=schedule.num_tokens,
        return_dict_in_generate=True,
    )
    started = time.perf_counter()
    out = draw(
        custom_generate=sjd_engine.hf.generate,
        # What follows is for it: the image's grid, which tokens are image codes, and how to decode.
        schedule=schedule,
        codes=range(ours.first_code, ours.first_code + ours.num_codes),
        **{"seed": 7, "window_size": 16, **arguments},
    )
    passes, seconds = out.stats.iterations[0], time.perf_counter() - started
    codes = out.sequences[:, ids.shape[1] :] - ours.first_code
    pixels = ours.decode(codes.view(1, schedule.rows, schedule.cols))
    sjd_engine.images.convert(pixels, "pil")[0].save(path)
    print(f"{path}: {schedule.num_tokens} tokens in {passes} passes, {seconds:.1f} s")
    if compare:
        started = time.perf_counter()
        draw()
        print(f"one token a pass, by transformers: {time.perf_counter() - started:.1f} s")
    return codes


if __name__ == "__main__":
    main(*sys.argv[1:])
