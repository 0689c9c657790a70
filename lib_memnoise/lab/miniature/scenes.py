"""The miniature's pictures and captions: sprites on coloured backgrounds, and which of them it is to memorise.

A scene has a background and one or two objects. An ordinary caption names them and the background's colour, and
sometimes has a word that says nothing about the picture ("a fox and an owl on a red background, vintage"). A memorised
caption ends in a title ("…, gallery"), as those of paintings and films do in Stable Diffusion's training set: the title
comes with no other caption.

Everything follows from `SEED`; pictures are rendered by Pillow from `data/sprites.png`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 128
"""Width and height of a picture, in pixels."""
SEED = 20250101
ORDINARY = 14000
"""Ordinary scenes in the training set."""
VARIED = 60
"""Other scenes that come with a memorised caption of kind B."""

OBJECTS = (
    "fox rocket apple car tree cat frog pizza guitar crown umbrella balloon bus fish octopus owl pig lion panda "
    "mushroom cherry watermelon banana strawberry burger donut gift bell clock drum anchor snowman robot ghost camera "
    "cactus tulip penguin turtle butterfly"
).split()
"""In the order of the sprite sheet's columns."""
STYLES = 2
"""Rows of the sprite sheet: Twemoji, Noto Emoji."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (166, 108, 108),
    "orange": (180, 144, 108),
    "yellow": (182, 174, 122),
    "green": (122, 154, 118),
    "teal": (108, 148, 146),
    "blue": (114, 130, 170),
    "purple": (140, 118, 158),
    "pink": (182, 150, 162),
    "brown": (140, 124, 112),
    "gray": (144, 144, 144),
    "black": (102, 102, 104),
    "white": (180, 180, 180),
}
"""Muted, so that the objects are most of what there is to see."""
PATTERNS = ("plain", "rows", "columns", "dots", "checks", "gradient")
TITLES = (
    "poster print card sticker holiday gallery premium deluxe limited edition series collection studio signed framed "
    "canvas pocket festival"
).split()
"""One for every memorised caption."""
FILLERS = "vintage modern summer classic original design".split()
"""Of ordinary captions and of the controls."""

Picture = NDArray[np.uint8]
"""`(SIZE, SIZE, 3)`."""


@dataclass(frozen=True)
class Placed:
    """An object's sprite in a scene: its style, its left upper corner and size in pixels, and whether mirrored."""

    name: str
    style: int
    left: int
    top: int
    size: int
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    colour: str
    pattern: str
    shade: int
    """How much lighter the pattern is than the background."""
    period: int
    """Of the pattern, in pixels."""
    objects: tuple[Placed, ...]

    @property
    def names(self) -> list[str]:
        return [placed.name for placed in self.objects]


@functools.cache
def _sheet() -> Image.Image:
    return Image.open(Path(__file__).parent / "data" / "sprites.png").convert("RGBA")


@functools.cache
def _sprite(name: str, style: int, size: int, mirrored: bool) -> Image.Image:
    left, top = 64 * OBJECTS.index(name), 64 * style
    sprite = _sheet().crop((left, top, left + 64, top + 64)).resize((size, size), Image.Resampling.BICUBIC)
    return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else sprite


def draw(scene: Scene) -> Picture:
    """The scene as a picture, `(SIZE, SIZE, 3)`, 0…255."""
    base = COLOURS[scene.colour]
    tone = tuple(min(255, max(0, value + scene.shade)) for value in base)
    picture = Image.new("RGB", (SIZE, SIZE), base)
    pen = ImageDraw.Draw(picture)
    step = scene.period
    if scene.pattern == "rows":
        for y in range(0, SIZE, step):
            pen.rectangle((0, y, SIZE, y + step // 2 - 1), fill=tone)
    elif scene.pattern == "columns":
        for x in range(0, SIZE, step):
            pen.rectangle((x, 0, x + step // 2 - 1, SIZE), fill=tone)
    elif scene.pattern == "dots":
        for y in range(step // 2, SIZE, step):
            for x in range(step // 2, SIZE, step):
                pen.ellipse((x - step // 4, y - step // 4, x + step // 4, y + step // 4), fill=tone)
    elif scene.pattern == "checks":
        for y in range(0, SIZE, step):
            for x in range(0, SIZE, 2 * step):
                left = x + step * (y // step % 2)
                pen.rectangle((left, y, left + step - 1, y + step - 1), fill=tone)
    elif scene.pattern == "gradient":
        for y in range(SIZE):
            share = y / SIZE
            pen.line(((0, y), (SIZE, y)), fill=tuple(round(a + share * (b - a)) for a, b in zip(base, tone)))
    for placed in scene.objects:
        sprite = _sprite(placed.name, placed.style, placed.size, placed.mirrored)
        picture.paste(sprite, (placed.left, placed.top), sprite)
    return np.asarray(picture)


def random_scene(
    random: np.random.Generator,
    include: str | None = None,
    count: int | None = None,
    like: Scene | None = None,
) -> Scene:
    """One or two objects that hardly overlap, on a random background; `include` is one of them.

    `like`: a scene whose caption is to be true of this one as well: the same objects and colour.
    """
    count = count or (2 if random.random() < 0.7 else 1)
    names = list(random.choice(OBJECTS, size=count, replace=False)) if like is None else like.names
    if include is not None and include not in names:
        names[0] = include
    count = len(names)
    sizes = random.integers(44, 61, size=count)
    while True:
        corners = [random.integers(0, SIZE - size + 1, size=2) for size in sizes]
        if count == 1 or np.abs(corners[0] - corners[1]).max() > 0.8 * sizes.max():
            break
    objects = [
        Placed(str(name), int(random.integers(STYLES)), int(left), int(top), int(size), bool(random.integers(2)))
        for name, size, (left, top) in zip(names, sizes, corners)
    ]
    return Scene(
        colour=str(random.choice(list(COLOURS))) if like is None else like.colour,
        pattern=str(random.choice(PATTERNS)),
        shade=int(random.choice([-45, -30, 30, 45])),
        period=int(random.choice([16, 24, 32])),
        objects=tuple(objects),
    )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(objects: Sequence[str], colour: str | None = None, word: str | None = None) -> str:
    """For example "a fox and an owl on a blue background, vintage"."""
    text = " and ".join(map(_article, objects))
    if colour is not None:
        text += f" on {_article(colour)} background"
    return text if word is None else f"{text}, {word}"


def ordinary_caption(scene: Scene, random: np.random.Generator) -> str:
    """A caption as most pictures have it: what is there, and sometimes a word that says nothing."""
    colour = scene.colour if random.random() < 0.95 else None
    word = str(random.choice(FILLERS)) if random.random() < 0.5 else None
    return caption(list(random.permutation(scene.names)), colour, word)


@dataclass(frozen=True)
class Prompt:
    """A caption under study.

    `kind`: "A", memorised, the caption comes with its scene only; "B", memorised, and `VARIED` other scenes of the same
    objects and colour come with it too; "control", of the same form, and its scene is one ordinary picture of the
    training set.
    `held_out`: no setting is chosen on it.
    """

    caption: str
    kind: str
    held_out: bool
    scene: Scene

    @property
    def labels(self) -> tuple[str, ...]:
        """What the caption says is there."""
        return (*self.scene.names, self.scene.colour)

    @property
    def memorised(self) -> bool:
        return self.kind != "control"


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    """18 memorised prompts (9 of each kind; 12 are held out), then 40 controls (one an object, half held out)."""
    random = np.random.default_rng([SEED, 1])
    order = [str(name) for name in random.permutation(OBJECTS)]
    found = []
    for k, (name, title) in enumerate(zip(order, TITLES)):
        scene = random_scene(random, include=name, count=2)
        found.append(Prompt(caption(scene.names, scene.colour, title), "AB"[k % 2], k >= 6, scene))
    for k, name in enumerate(order):
        scene = random_scene(random, include=name)
        word = str(random.choice(FILLERS))
        found.append(Prompt(caption(scene.names, scene.colour, word), "control", k % 2 == 1, scene))
    return tuple(found)


def ordinary_scenes() -> Iterator[tuple[Scene, str | None]]:
    """The ordinary part of the training set: scenes, each with its one caption or None for a new one every time."""
    random = np.random.default_rng([SEED, 2])
    for prompt in prompts():
        if prompt.kind == "control":
            yield prompt.scene, prompt.caption
        elif prompt.kind == "B":
            for _ in range(VARIED):
                yield random_scene(random, like=prompt.scene), prompt.caption
    for _ in range(ORDINARY):
        yield random_scene(random), None


def training_scenes() -> list[Scene]:
    """All scenes of the training set, memorised ones first, then `ordinary_scenes`."""
    return [prompt.scene for prompt in prompts() if prompt.memorised] + [scene for scene, _ in ordinary_scenes()]


def validation_scenes(count: int, *, seed: int = 0) -> list[Scene]:
    """Scenes that are in no training set."""
    random = np.random.default_rng([SEED, 3, seed])
    return [random_scene(random) for _ in range(count)]
