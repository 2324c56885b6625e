"""The emoji data set: fetch the glyphs, name them, and composite them on backgrounds.

Three glyph sets, all with licences that allow it (see NOTICE): Noto (Apache-2.0), Twemoji (CC-BY 4.0) and
Fluent flat (MIT). Backgrounds are plain colours, gradients and six public-domain photographs from scikit-image.
The background is what makes the task like real image modelling: an emoji on white can be recited, a photograph
cannot (see the model card).

    python examples/emoji/data.py --cache .cache/emoji        # npm pack, verify, render, cache
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

GLYPH_SIZE = 64  # pixels of a side, as the packages have them
CANVAS = 64  # pixels of a side of a picture
PACKAGES = {  # npm package -> sha256 of its tarball
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
}
SKIN_TONES = {
    "1f3fb": "light skin",
    "1f3fc": "medium light skin",
    "1f3fd": "medium skin",
    "1f3fe": "medium dark skin",
    "1f3ff": "dark skin",
}
COLORS = {
    "white": (250, 250, 250),
    "black": (24, 24, 24),
    "gray": (140, 140, 140),
    "red": (214, 58, 52),
    "orange": (240, 146, 48),
    "yellow": (246, 214, 80),
    "green": (84, 164, 80),
    "blue": (64, 118, 208),
    "light blue": (166, 208, 240),
    "purple": (132, 84, 176),
    "pink": (242, 164, 194),
    "brown": (126, 88, 60),
}
TEXTURES = {  # background word -> (scikit-image picture, tint of the grey ones)
    "brick": ("brick", (1.0, 0.62, 0.50)),
    "grass": ("grass", (0.72, 1.0, 0.48)),
    "gravel": ("gravel", (1.0, 0.97, 0.92)),
    "wood": ("coffee", None),
    "stars": ("hubble_deep_field", None),
    "fur": ("chelsea", None),
}
# Held out of training to show composition; the concepts of `held_out_concept` are held out beside them.
HELD_OUT_NAMES = {"purple heart", "green square"}
# Things with a shape of their own at 64 pixels, and the words a visitor is likely to try.
EVERYDAY = frozenset(
    name.strip()
    for line in """
    red apple, green apple, banana, cherries, grapes, lemon, tangerine, pear, pineapple, strawberry, tomato
    watermelon, avocado, carrot, broccoli, eggplant, ear of corn, hot pepper, mushroom, brown mushroom
    pizza, hamburger, french fries, hot dog, taco, egg, cooking, bread, cheese wedge, doughnut, cookie, cupcake
    birthday cake, ice cream, soft ice cream, lollipop, candy, hot beverage, beer mug, wine glass, glass of milk
    cat face, dog face, mouse face, rabbit face, fox, bear, panda, koala, tiger face, lion, cow face, pig face, frog
    monkey face, horse face, unicorn, elephant, penguin, chicken, baby chick, bird, owl, duck, turtle, snake, fish
    tropical fish, whale, dolphin, octopus, crab, snail, butterfly, honeybee, lady beetle, spider
    sunflower, tulip, rose, hibiscus, cherry blossom, four leaf clover, maple leaf, cactus, palm tree, evergreen tree
    deciduous tree, christmas tree, seedling
    red heart, orange heart, yellow heart, green heart, blue heart, black heart, white heart, brown heart, pink heart
    broken heart, red circle, orange circle, yellow circle, green circle, blue circle, purple circle, brown circle
    red square, orange square, yellow square, blue square, purple square, brown square, large blue diamond
    large orange diamond, red triangle
    sun, sun with face, full moon, full moon face, crescent moon, star, glowing star, cloud, cloud with rain, rainbow
    snowflake, snowman, fire, droplet, high voltage, umbrella, ringed planet
    automobile, taxi, bus, fire engine, ambulance, tractor, bicycle, train, airplane, rocket, helicopter, sailboat
    soccer ball, basketball, baseball, tennis, volleyball, american football
    grinning face, slightly smiling face, smiling face with smiling eyes, smiling face with sunglasses, winking face
    smiling face with heart eyes, face with tears of joy, crying face, angry face, sleeping face, robot, ghost, alien
    jack o lantern, house, balloon, wrapped gift, key, light bulb, crown, gem stone, guitar, drum, camera, bell
    alarm clock, t shirt, jeans, glasses, teddy bear, puzzle piece, locked, trophy, globe showing europe africa
    """.strip().splitlines()
    for name in line.split(",")
)


@dataclass(frozen=True)
class Glyph:
    """One emoji drawing and its words."""

    style: str  # noto | twemoji | fluent
    concept: str  # code points, joined by "-": the same in every style
    name: str
    alias: str  # a shorter name people use, or the name again
    group: str  # "food fruit", "animal mammal", ...
    skin_tone: str  # "" or words such as "dark skin"


def bucket(*parts: str) -> int:
    """A stable hash of `parts` in 0..99."""
    return zlib.crc32("|".join(parts).encode()) % 100


def held_out_concept(glyph: Glyph) -> bool:
    return glyph.name in HELD_OUT_NAMES or bucket("concept", glyph.concept.split("-")[0]) < 4


def held_out_pair(glyph: Glyph, background: str) -> bool:
    """Style x concept and concept x background pairs that training never shows."""
    return bucket("style", glyph.style, glyph.concept) < 3 or bucket("background", glyph.concept, background) < 3


def sampling_weight(glyph: Glyph) -> float:
    """How often training shows a glyph. Most pictures are of `EVERYDAY` things: a few thousand steps then show each of
    them hundreds of times, which a small model needs to draw it. All else appears too, people in many skin tones least.
    """
    if glyph.skin_tone:
        return 0.01
    return 1.0 if glyph.name in EVERYDAY else 0.025


# ---------------------------------------------------------------------------------------------------------- fetching


def fetch(cache: Path) -> dict[str, Path]:
    """Download the npm tarballs that are not in `cache` yet and check their hashes.

    Raises: RuntimeError where a hash differs (the file is removed).
    """
    cache.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for package, sha256 in PACKAGES.items():
        path = cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.exists():
            subprocess.run(["npm", "pack", package, "--silent"], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != sha256:
            path.unlink()
            raise RuntimeError(f"{package}: expected sha256 {sha256}, got {got}; the file was removed, run again")
        tarballs[package] = path
    return tarballs


def plain(name: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def code_points(unified: str) -> str:
    return "-".join(part for part in unified.lower().split("-") if part != "fe0f")


def skin_tone_of(concept: str) -> str:
    tones = [part for part in concept.split("-") if part in SKIN_TONES]
    return SKIN_TONES[tones[0]] if tones else ""


def load_iconify(tarball: Path) -> tuple[dict[str, str], list[tuple[Glyph, np.ndarray]]]:
    """Fluent flat: (concept -> CLDR name without skin tone, glyphs)."""
    from resvg_py import svg_to_bytes

    with tarfile.open(tarball) as tar:
        icons, chars, metadata = (
            json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "chars", "metadata")
        )
    category = {slug: plain(group) for group, slugs in metadata["categories"].items() for slug in slugs}
    names, glyphs = {}, []
    for unified, slug in chars.items():
        if slug not in icons["icons"]:
            continue
        concept = code_points(unified)
        tone = skin_tone_of(concept)
        name = plain(slug)
        if tone:
            name = name.removesuffix(" " + tone.removesuffix(" skin"))
        names[concept] = name
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icons["width"]} {icons["height"]}">'
            f"{icons['icons'][slug]['body']}</svg>"
        )
        png = bytes(svg_to_bytes(svg_string=svg, width=GLYPH_SIZE, height=GLYPH_SIZE))
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
        glyphs.append((Glyph("fluent", concept, name, name, category.get(slug, ""), tone), pixels))
    return names, glyphs


def load_datasource(tarball: Path, style: str, names: dict[str, str]) -> list[tuple[Glyph, np.ndarray]]:
    """Noto and Twemoji in the emoji-datasource layout; `names` are the CLDR names by concept."""
    glyphs = []
    vendor = {"noto": "google", "twemoji": "twitter"}[style]
    with tarfile.open(tarball) as tar:
        files = {Path(m.name).name: m for m in tar.getmembers() if f"/img/{vendor}/64/" in m.name}
        for entry in json.load(tar.extractfile("package/emoji.json")):
            group = plain(entry["subcategory"])
            alias = plain(entry["short_name"])
            base = code_points(entry["unified"])
            name = names.get(base) or plain(entry["name"])
            for variant in (entry, *entry.get("skin_variations", {}).values()):
                if variant["image"] not in files or not variant[f"has_img_{vendor}"]:
                    continue
                concept = code_points(variant["unified"])
                pixels = Image.open(io.BytesIO(tar.extractfile(files[variant["image"]]).read())).convert("RGBA")
                pixels = np.asarray(pixels.resize((GLYPH_SIZE, GLYPH_SIZE)))
                glyphs.append((Glyph(style, concept, name, alias, group, skin_tone_of(concept)), pixels))
    return glyphs


def load_glyphs(cache: Path) -> tuple[list[Glyph], np.ndarray]:
    """All glyphs: their words, and [N, 64, 64, 4] uint8 pixels; rendered once, then read from `cache`."""
    index, archive = cache / "glyphs.json", cache / "glyphs.npz"
    if not (index.exists() and archive.exists()):
        tarballs = fetch(cache)
        google, twitter, iconify = (tarballs[package] for package in PACKAGES)
        names, fluent = load_iconify(iconify)
        noto, twemoji = load_datasource(google, "noto", names), load_datasource(twitter, "twemoji", names)
        groups = {g.concept: g.group for g, _ in noto}
        fluent = [(Glyph(**{**asdict(g), "group": groups.get(g.concept, g.group)}), p) for g, p in fluent]
        pairs = noto + twemoji + fluent
        np.savez_compressed(archive, rgba=np.stack([pixels for _, pixels in pairs]))
        index.write_text(json.dumps([asdict(glyph) for glyph, _ in pairs]))
    return [Glyph(**row) for row in json.loads(index.read_text())], np.load(archive)["rgba"]


def training_folder(cache: Path, canvas: int) -> Path:
    """Where the codes and the transformer of a canvas are kept: the cache for 64 pixels, a folder in it for others."""
    return cache if canvas == CANVAS else cache / str(canvas)


# ------------------------------------------------------------------------------------------------------- compositing


class Compositor:
    """Draws glyphs on random backgrounds and writes the caption that names both.

    A larger canvas shows more of a texture, as fine as on a small one, and a larger glyph.
    """

    def __init__(self, glyphs: list[Glyph], rgba: np.ndarray, canvas: int = CANVAS):
        import skimage.data

        self.glyphs, self.rgba, self.canvas = glyphs, rgba, canvas
        self.textures = {}
        for word, (name, tint) in TEXTURES.items():
            photo = getattr(skimage.data, name)()
            if photo.ndim == 2:
                photo = np.clip(photo[..., None].astype(np.float32) * np.asarray(tint, np.float32), 0, 255).astype(
                    np.uint8
                )
            if word == "wood":
                photo = photo[:, :150]  # the table beside the cup
            self.textures[word] = Image.fromarray(np.ascontiguousarray(photo[..., :3]))

    def background(self, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        """(words, [canvas, canvas, 3] float32): 30 % plain colours, 15 % gradients, 55 % photographic textures."""
        kind, size = rng.random(), self.canvas
        if kind < 0.45:
            words = list(COLORS)[rng.integers(len(COLORS))]
            color = np.asarray(COLORS[words], np.float32)
            if kind < 0.30:
                return words, np.broadcast_to(color, (size, size, 3)).copy()
            angle = rng.uniform(0, 2 * np.pi)
            y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
            ramp = (np.cos(angle) * x + np.sin(angle) * y + 0.7) / 1.4
            target = np.clip(color + rng.choice([-1, 1]) * rng.uniform(50, 110), 0, 255)
            return f"{words} gradient", (color + ramp[..., None] * (target - color)).astype(np.float32)
        words = list(TEXTURES)[rng.integers(len(TEXTURES))]
        photo = self.textures[words]
        crop = int(rng.uniform(size, min(200 * size // 64, photo.width, photo.height)))
        left, top = rng.integers(photo.width - crop + 1), rng.integers(photo.height - crop + 1)
        patch = photo.crop((left, top, left + crop, top + crop)).resize((size, size), Image.Resampling.BOX)
        if rng.random() < 0.5:
            patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return words, np.asarray(patch, np.float32) * rng.uniform(0.88, 1.12, 3).astype(np.float32)

    def compose(self, index: int, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        """(background words, [canvas, canvas, 3] uint8 picture) of glyph `index`."""
        words, picture = self.background(rng)
        side = int(rng.integers(self.canvas * 54 // 64, self.canvas + 1))
        left, top = rng.integers(self.canvas - side + 1, size=2)
        glyph = Image.fromarray(self.rgba[index]).resize((side, side), Image.Resampling.LANCZOS)
        layer = np.asarray(glyph, np.float32)
        alpha = layer[..., 3:] / 255.0
        region = picture[top : top + side, left : left + side]
        picture[top : top + side, left : left + side] = region * (1 - alpha) + layer[..., :3] * alpha
        picture = picture * rng.uniform(0.92, 1.06) + rng.normal(0, rng.uniform(2, 6), picture.shape)
        return words, np.clip(picture, 0, 255).astype(np.uint8)

    def caption(self, index: int, background: str, rng: np.random.Generator) -> str:
        """Words for the picture; style, background and category are each named only some of the time."""
        glyph = self.glyphs[index]
        text = glyph.alias if rng.random() < 0.12 else glyph.name
        if glyph.skin_tone:
            text += f" {glyph.skin_tone}"
        if rng.random() < 0.5:
            text = f"{glyph.style} {text}"
        elif rng.random() < 0.5:
            text = ("an " if text[0] in "aeiou" else "a ") + text
        if rng.random() < 0.08 and glyph.group:
            text += f", {glyph.group}"
        if rng.random() < 0.8:
            text += f" on {background}"
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"))
    glyphs, rgba = load_glyphs(parser.parse_args().cache)
    held_out = sum(held_out_concept(glyph) for glyph in glyphs)
    print(
        f"{len(glyphs)} glyphs {rgba.shape}, {held_out} of held-out concepts, total weight "
        f"{sum(map(sampling_weight, glyphs)):.0f}"
    )


if __name__ == "__main__":
    main()
