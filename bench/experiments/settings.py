"""What a row of a table decodes."""

import ast
from dataclasses import dataclass
from typing import Any

from sjd_engine.methods import METHODS


@dataclass(frozen=True)
class Setting:
    """Arguments of `Engine.generate`.

    window: tokens of a pass, or "auto".
    init: None for the family's default.
    top_k: 0 keeps all.
    options: further arguments, by name.
    """

    method: str
    window: int | str
    init: str | None = "random"
    top_k: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def variant(text: str, window: int | str, top_k: int) -> "Setting":
        """From "method name=value …", values in Python's notation without spaces: "sjd++ reuse_threshold=0.1".

        Raises: ValueError where the text is none of this kind.
        """
        method, *words = text.split()
        options = []
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"variants: expected 'method name=value ...', got {text!r}")
            try:
                options.append((name, ast.literal_eval(value)))
            except (SyntaxError, ValueError):
                options.append((name, value))
        named = dict(options)
        init = named.pop("init", "random")
        return Setting(method, window, init, top_k, tuple(named.items()))

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `generate` that are not left to the family."""
        chosen = {"method": self.method, "window_size": self.window, "init": self.init, "top_k": self.top_k}
        return {name: value for name, value in chosen.items() if value is not None} | dict(self.options)

    @property
    def lossless(self) -> bool:
        """Images follow the law of the model exactly; with verify="paper" those of sjd2 do not."""
        return METHODS[self.method].lossless and dict(self.options).get("verify") != "paper"

    @property
    def label(self) -> str:
        """The method and what is unusual about it."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    @property
    def title(self) -> str:
        """All but the top-k, for people."""
        init = "" if self.init == "random" else f" {self.init or 'default init'}"
        return f"{self.label}{init}, W {self.window}"
