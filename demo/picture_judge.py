"""The judge of pictures: a small classifier of cells, trained on real renderings and never on a model's output.

It reads a scene as what stands in each of the four cells, or nothing ("none of these": empty cells, torn, mixed or
scrambled objects, noise, and whatever it is not sure of), and the background from the colour of the border.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from onevocab.common.files import write_atomic
from onevocab.demo import world

CELL = 32
SLACK = 3  # pixels by which a training crop may be off its cell
TOLERANCE = 60.0  # RGB distance up to which a border counts as one of the backgrounds
VERSION = 2  # of this file's training recipe: part of the cache's key


@dataclass(frozen=True)
class Reading:
    """What the judge sees. background: a name or None; cells: four names or None, in the order of world.CELLS."""

    background: str | None
    cells: tuple[str | None, ...]

    @property
    def names(self) -> list[str]:
        return [name for name in self.cells if name is not None]


class CellClassifier(nn.Module):
    """Cells (n, 3, 32, 32) in [-1, 1] -> logits (n, classes)."""

    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False)
        self.norm0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width * 16, classes)

    def forward(self, cells: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(cells)))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(x + self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        return self.head(x.flatten(1))


def to_array(picture) -> np.ndarray:
    """A picture of any size -> uint8 (64, 64, 3)."""
    if picture.size != (2 * CELL, 2 * CELL):
        picture = picture.resize((2 * CELL, 2 * CELL))
    return np.asarray(picture.convert("RGB"))


def to_cells(pictures: np.ndarray) -> np.ndarray:
    """uint8 (n, 64, 64, 3) -> cells (n, 4, 32, 32, 3): top left, top right, bottom left, bottom right."""
    return rearrange(pictures, "n (row h) (column w) rgb -> n (row column) h w rgb", h=CELL, w=CELL)


def border_colour(picture: np.ndarray) -> np.ndarray:
    """The median colour (3,) of the outer two pixels of a picture (64, 64, 3)."""
    edges = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def training_scenes(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random scenes, rendered: pictures uint8 (count, 64, 64, 3) and the class in each cell (count, 4).

    Class len(NAMES) is "none of these", here an empty cell. Names go round in turn, so that all are equally frequent.
    """
    backgrounds, tints = list(world.BACKGROUNDS), list(world.TINTS)
    labels = rng.permutation(np.resize(np.arange(len(world.NAMES)), count * 4)).reshape(count, 4)
    labels[rng.random(labels.shape) < 0.15] = len(world.NAMES)
    pictures = np.empty((count, 2 * CELL, 2 * CELL, 3), np.uint8)
    for i, classes in enumerate(labels):
        things = []
        for cell, k in enumerate(classes):
            if k < len(world.NAMES):
                name = world.NAMES[k]
                tinted = name in world.TINTABLE and rng.random() < 0.6
                things.append(world.SceneObject(name, cell, tints[rng.integers(len(tints))] if tinted else None))
        pictures[i] = world.render(world.Scene(backgrounds[rng.integers(len(backgrounds))], tuple(things)))
    return pictures, labels


def crops(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cells of scenes, each up to SLACK pixels off its place: (n, 64, 64, 3) -> (n * 4, 32, 32, 3)."""
    padded = np.pad(pictures, ((0, 0), (SLACK, SLACK), (SLACK, SLACK), (0, 0)), mode="edge")
    cells = np.empty((len(pictures), 4, CELL, CELL, 3), np.uint8)
    offsets = rng.integers(0, 2 * SLACK + 1, (len(pictures), 4, 2))
    for i, picture in enumerate(padded):
        for cell, (down, right) in enumerate(offsets[i]):
            top, left = down + CELL * (cell // 2), right + CELL * (cell % 2)
            cells[i, cell] = picture[top : top + CELL, left : left + CELL]
    return cells.reshape(-1, CELL, CELL, 3)


def augment(cells: Tensor, generator: torch.Generator) -> Tensor:
    """What a tokenizer may do to a cell (n, 3, 32, 32) in [-1, 1]: blur, loss of resolution, colour shifts, noise."""
    n = len(cells)

    def chance(p: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < p).float()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *(shape or (1, 1, 1)), generator=generator)

    small = F.interpolate(F.avg_pool2d(cells, 2), scale_factor=2, mode="bilinear", align_corners=False)
    cells = cells + (small - cells) * chance(0.5) * uniform(0.3, 1.0)
    box = F.avg_pool2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, 1)
    cells = cells + (box - cells) * chance(0.4) * uniform(0.3, 1.0)
    grey = (cells * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    cells = cells + (grey - cells) * chance(0.2)  # grey is still the same object
    cells = cells * uniform(0.8, 1.15) * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.12, 0.12, 3, 1, 1)
    noise = torch.randn(cells.shape, generator=generator) * uniform(0.0, 0.12)
    flip = chance(0.3)
    cells = cells * (1 - flip) + cells.flip(3) * flip
    return (cells + noise).clamp(-1, 1)


def spoil(cells: Tensor, labels: Tensor, none: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turns about a sixth of a batch into things that are none of the names, and labels them so."""
    n = len(cells) // 6
    if n < 5:
        return cells, labels
    cells, labels = cells.clone(), labels.clone()
    other = cells[torch.randperm(len(cells), generator=generator)[:n]]
    spoiled, part = cells[:n].clone(), max(1, n // 5)
    half, quarter = CELL // 2, CELL // 4
    spoiled[:part, :, :, half:] = other[:part, :, :, half:]  # two halves of two objects
    spoiled[part : 2 * part] = (spoiled[part : 2 * part] + other[part : 2 * part]) / 2  # both at once
    blocks = spoiled[2 * part : 3 * part].unflatten(3, (4, quarter)).unflatten(2, (4, quarter))
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    blocks = blocks[:, torch.randperm(16, generator=generator)].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5)
    spoiled[2 * part : 3 * part] = blocks.flatten(4, 5).flatten(2, 3)  # scrambled
    plain = spoiled[3 * part : 4 * part, :, :1, :1]
    if torch.rand(1, generator=generator) < 0.5:  # most of it missing
        spoiled[3 * part : 4 * part, :, :, 11:] = plain
    else:
        spoiled[3 * part : 4 * part, :, 11:, :] = plain
    coarse = torch.rand(n - 4 * part, 3, 8, 8, generator=generator) * 2 - 1
    spoiled[4 * part :] = F.interpolate(coarse, size=(CELL, CELL), mode="bilinear")  # blobs of colour
    empty = labels[:n] == none
    # Half an object beside an empty neighbour may still be that object; only two different ones are surely none.
    labels[:n] = torch.where(empty, labels[:n], torch.full_like(labels[:n], none))
    cells[:n] = spoiled
    return cells, labels


class PictureJudge:
    """Reads scenes. Make one with `PictureJudge.of(folder)`."""

    def __init__(self, network: CellClassifier, floor: float = 0.5):
        self.network, self.names, self.floor = network.eval(), world.NAMES, floor
        self.background_names = list(world.BACKGROUNDS)
        self.colours = np.array([world.BACKGROUNDS[name] for name in self.background_names], float)

    @staticmethod
    def key(steps: int, seed: int) -> str:
        """Hash of everything that the judge is trained from: sprites, names, backgrounds, tints, recipe."""
        recipe = [VERSION, steps, seed, world.NAMES, list(world.BACKGROUNDS.values()), list(world.TINTS.values())]
        digest = hashlib.sha256(json.dumps(recipe).encode())
        for name in world.NAMES:
            digest.update(world.sprite(name)[0].tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def of(cls, folder: Path, steps: int = 220, seed: int = 0, floor: float = 0.5) -> "PictureJudge":
        """The judge of the demo world, from its cache in `folder`, or trained now (about 20 s on one core)."""
        path = Path(folder) / f"picture-judge-{cls.key(steps, seed)}.safetensors"
        network = CellClassifier(len(world.NAMES) + 1)
        try:
            network.load_state_dict(load_tensors(path.read_bytes()))
        except (OSError, RuntimeError, ValueError, SafetensorError):  # absent, or broken: it is only a cache
            network = train_cells(steps, seed)
            write_atomic(path, save_tensors({k: v.contiguous() for k, v in network.state_dict().items()}))
        return cls(network, floor)

    def background(self, picture: np.ndarray) -> str | None:
        """Name of the background of a picture (64, 64, 3), None when its border has none of the colours."""
        distance = np.linalg.norm(self.colours - border_colour(picture), axis=1)
        nearest = int(distance.argmin())
        return self.background_names[nearest] if distance[nearest] <= TOLERANCE else None

    @torch.inference_mode()
    def probabilities(self, cells: np.ndarray) -> np.ndarray:
        """uint8 (n, 32, 32, 3) -> (n, names + 1), the last column "none of these"."""
        x = torch.from_numpy(np.ascontiguousarray(cells)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self.network(part).softmax(-1) for part in x.split(512)]).numpy()

    def read(self, pictures) -> list[Reading]:
        """What stands in each of some PIL pictures (resized to 64x64 where they are not)."""
        if not pictures:
            return []
        arrays = np.stack([to_array(picture) for picture in pictures])
        seen = self.probabilities(to_cells(arrays).reshape(-1, CELL, CELL, 3)).reshape(len(arrays), 4, -1)
        readings = []
        for picture, cells in zip(arrays, seen, strict=True):
            best = cells.argmax(1)
            names = tuple(
                self.names[k] if k < len(self.names) and cells[i, k] >= self.floor else None
                for i, k in enumerate(best)
            )
            readings.append(Reading(self.background(picture), names))
        return readings


def train_cells(steps: int, seed: int = 0, batch: int = 128) -> CellClassifier:
    """Trains the classifier of cells on `steps` batches of fresh crops. The same seed gives the same judge."""
    rng = np.random.default_rng(seed + 7919)
    generator = torch.Generator().manual_seed(seed + 7919)
    pictures, labels = training_scenes(min(steps * batch // 4, 2500), rng)
    labels = torch.from_numpy(labels.astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 7919)
        network = CellClassifier(len(world.NAMES) + 1)
    network = network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        rows = rng.choice(len(pictures), batch // 4, replace=False)
        cells = torch.from_numpy(crops(pictures[rows], rng)).permute(0, 3, 1, 2).float() / 127.5 - 1
        order = torch.randperm(batch, generator=generator)
        cells, target = spoil(cells[order], labels[rows].reshape(-1)[order], len(world.NAMES), generator)
        loss = F.cross_entropy(network(augment(cells, generator)), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()
