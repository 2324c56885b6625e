"""`model.generate` of transformers on the same checkpoint: guidance, image tokens only, sampling."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sjd_engine import Engine
from sjd_engine.models import checkpoint_folder


class TransformersGenerate:
    """transformers' own loop at the faster of its two guided settings.

    Args:
        name: the checkpoint.
        engine: of the same checkpoint; its prompts and defaults are used.
    Raises: ImportError without transformers; ValueError, OSError where it cannot load the checkpoint.
    """

    def __init__(self, name: str, engine: Engine):
        import transformers

        transformers.logging.set_verbosity_error()
        self.engine, self.transformers = engine, transformers
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint_folder(name), dtype=engine.model.transformer.dtype, attn_implementation="sdpa"
        )
        self.num_tokens = engine.model.schedule(*engine.model.image_size).num_tokens
        self.settings: dict[str, Callable[[str, int], Tensor]] = {
            "guidance_scale= (two passes a token)": self.two_passes,
            "guided pair in one batch": self.one_batch,
        }
        self.run = self.one_batch
        self.taken: list[float] = []

    def _generate(
        self, ids: Tensor, mask: Tensor, seed: int, processors: list, sample: bool, **extra: object
    ) -> Tensor:
        torch.manual_seed(seed)
        return self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=sample,
            top_k=0 if sample else None,
            max_new_tokens=self.num_tokens,
            min_new_tokens=self.num_tokens,
            pad_token_id=0,
            logits_processor=self.transformers.LogitsProcessorList(processors),
            **extra,
        )

    def two_passes(self, prompt: str, seed: int) -> Tensor:
        """transformers' own guidance: the unconditional pass is a second call of the model."""
        model = self.engine.model
        contexts = model.build_prompt(prompt, None, *model.image_size)
        first = model.first_code

        def image_only(_: Tensor, scores: Tensor) -> Tensor:
            out = torch.full_like(scores, float("-inf"))
            out[:, first : first + model.num_codes] = scores[:, first : first + model.num_codes]
            return out

        ids = torch.tensor([contexts.conditional.ids])
        negative = torch.tensor([contexts.unconditional.ids])
        scale = model.defaults.params.guidance_scale
        return self._generate(
            ids,
            torch.ones_like(ids),
            seed,
            [image_only],
            sample=True,
            guidance_scale=scale,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
        )

    def one_batch(self, prompt: str, seed: int) -> Tensor:
        """Conditional and unconditional rows of one batch; the processor draws the token for both."""
        model = self.engine.model
        contexts = model.build_prompt(prompt, None, *model.image_size)
        first, scale = model.first_code, model.defaults.params.guidance_scale

        def draw_for_both(_: Tensor, scores: Tensor) -> Tensor:
            conditional, unconditional = scores[:, first : first + model.num_codes].float()
            probs = (unconditional + scale * (conditional - unconditional)).softmax(-1)
            out = torch.full_like(scores, float("-inf"))
            out[:, first + torch.multinomial(probs, 1)] = 0.0
            return out

        width = len(contexts.conditional)
        ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
        for row, context in enumerate((contexts.conditional, contexts.unconditional)):
            ids[row, width - len(context) :], mask[row, width - len(context) :] = torch.tensor(context.ids), 1
        return self._generate(ids, mask, seed, [draw_for_both], sample=False)

    def choose_fastest(self, prompt: str) -> tuple[str, dict[str, float]]:
        """Time both settings once, after a warm-up, and keep the faster."""
        seconds = {}
        for name, setting in self.settings.items():
            seconds[name] = min(self.seconds(setting, prompt, seed) for seed in range(2))
        fastest = min(seconds, key=seconds.__getitem__)
        self.run = self.settings[fastest]
        return fastest, {name: round(value, 3) for name, value in seconds.items()}

    @staticmethod
    def seconds(setting: Callable[[str, int], Tensor], prompt: str, seed: int) -> float:
        started = time.perf_counter()
        setting(prompt, seed)
        return time.perf_counter() - started

    def take(self, prompt: str, seed: int) -> None:
        """Decode an image and note its seconds."""
        self.taken.append(self.seconds(self.run, prompt, seed))
