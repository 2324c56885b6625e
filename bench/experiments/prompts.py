"""Captions of the emoji model: styles, backgrounds and things that it was trained on."""

PROMPTS = [
    "a red apple on grass",
    "noto soccer ball on brick",
    "twemoji smiling face with sunglasses on white",
    "fluent red heart on wood",
    "a tree on blue gradient",
    "noto dog face on gravel",
    "twemoji pizza on stars",
    "fluent sunflower on fur",
    "a blue car on gray",
    "noto strawberry on wood",
    "twemoji crescent moon on stars",
    "fluent cat face on grass",
    "a yellow star on purple",
    "noto basketball on brick",
    "twemoji mushroom on grass",
    "fluent rainbow on light blue",
    "a banana on wood",
    "noto penguin on white",
    "twemoji rocket on stars",
    "fluent hamburger on gravel",
    "a house on grass",
    "noto owl on wood",
    "twemoji umbrella on light blue",
    "fluent guitar on brick",
    "a snowman on blue gradient",
    "noto tiger face on fur",
    "twemoji cupcake on purple",
    "fluent crown on gray",
    "a green apple on white",
    "noto butterfly on grass",
    "twemoji balloon on stars",
    "fluent key on brick",
]


def take(count: int) -> list[str]:
    """The first `count` captions, from the beginning again where there are no more; each gets a seed of its own."""
    return [PROMPTS[i % len(PROMPTS)] for i in range(count)]
