"""From image files to batches of pixels: what the processes that decode run."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

Transform = Callable[[Image.Image], Image.Image]

RESIZE = 256 / 224  # in evaluation the shorter side is resized to this multiple of the square that is cut out
AREA = (0.08, 1.0)  # of a random crop, as a share of the image
RATIO = (3 / 4, 4 / 3)  # of its width to its height
TRIES = 10  # at a crop that fits into the image
REPLACEMENTS = 100  # so many unreadable images in a row are no matter of single files


class Task(NamedTuple):
    """One batch to decode: the numbers of its images, and the seed of the pass in training (None: evaluation)."""

    numbers: list[int]
    seed: int | None


class Decoded(NamedTuple):
    """One batch: pixels uint8 [b, size, size, 3], labels int64 [b], what could not be read [(file, reason)], and
    whether the batch had to be given up because of the last of these."""

    pixels: Tensor
    labels: Tensor
    bad: list[tuple[str, str]]
    given_up: bool


class ImageFiles:
    """The paths and labels of N images. They are kept in three arrays: processes that share the memory of a million
    Python strings end up with a copy each, because reading one changes its count of references.

    Args:
        root: a folder.
        names: paths of the images below it.
        labels: their classes.
    """

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int]):
        encoded = [os.fsencode(name) for name in names]
        self.root = root
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)  # [N + 1]
        self.labels = np.asarray(labels, dtype=np.int64)  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """The same for the same names and labels in the same order, wherever the folder lies."""
        found = hashlib.blake2b(digest_size=16)
        for array in (self._text, self._ends, self.labels):
            found.update(array.tobytes())
        return found.hexdigest()

    def path(self, number: int) -> str:
        start, end = self._ends[number : number + 2]
        return os.path.join(self.root, os.fsdecode(self._text[start:end].tobytes()))


class Decoder(Dataset[Decoded]):
    """Decodes batch by batch: `decoder[task]`. An image depends on its file, its number and the seed of the pass alone.

    Args:
        image_size: side of the square images in pixels.
        skip_bad: what to do with an image that cannot be read. False: the batch is given up. True: in training the next
            image that can be read replaces it, so that batches keep their size; in evaluation it is left out.
    """

    def __init__(self, files: ImageFiles, image_size: int, *, skip_bad: bool):
        self.files, self.image_size, self.skip_bad = files, image_size, skip_bad
        self.augment, self.cut = training_transform(image_size), evaluation_transform(image_size)

    def __getitem__(self, task: Task) -> Decoded:
        size = self.image_size
        pixels = np.empty((len(task.numbers), size, size, 3), dtype=np.uint8)
        labels = np.empty(len(task.numbers), dtype=np.int64)
        bad: list[tuple[str, str]] = []
        count = 0
        for wanted in task.numbers:
            number = self._decode_into(pixels[count], wanted, task.seed, bad)
            if number is not None:
                labels[count] = self.files.labels[number]
                count += 1
            elif not self.skip_bad or task.seed is not None:
                return Decoded(torch.empty(0), torch.empty(0), bad, given_up=True)
        return Decoded(torch.from_numpy(pixels[:count]), torch.from_numpy(labels[:count]), bad, given_up=False)

    def _decode_into(
        self, pixels: NDArray[np.uint8], number: int, seed: int | None, bad: list[tuple[str, str]]
    ) -> int | None:
        """Fills pixels [size, size, 3]. Returns the number of the image in them, or None if there is none to be had."""
        for _ in range(REPLACEMENTS if seed is not None and self.skip_bad else 1):
            path = self.files.path(number)
            try:
                image = read_image(path)
            except ValueError as error:
                bad.append((path, str(error)))
                number = (number + 1) % len(self.files)
                continue
            pixels[:] = np.asarray(self._transform(image, number, seed))
            return number
        return None

    def _transform(self, image: Image.Image, number: int, seed: int | None) -> Image.Image:
        if seed is None:
            return self.cut(image)
        digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
            return self.augment(image)


def read_image(path: str) -> Image.Image:
    """The image in a file, whole, as RGB; 16-bit grey is scaled to 8.

    Raises:
        ValueError: the file cannot be opened, is no image, or is truncated or damaged; the text is the reason.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.int64) // 257
                return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or one of an unknown format") from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders meet damaged files with errors of any kind
        raise ValueError(str(error) or type(error).__name__) from error


def training_transform(size: int) -> Transform:
    """A random crop of 8 to 100 % of the image, resized to `size`, mirrored half of the time (Szegedy et al. 2015).

    By torchvision where it is installed, else by Pillow alone: the same pixels for the same state of the random
    generator of torch.
    """
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        return RandomCrop(size)
    return v2.Compose([v2.RandomResizedCrop(size, AREA, RATIO), v2.RandomHorizontalFlip()])


def evaluation_transform(size: int) -> Transform:
    """The middle of the image: its shorter side is resized to `RESIZE * size`, then a square of `size` is cut out; by
    torchvision where it is installed, else by Pillow alone, with the same pixels."""
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError):
        return CenterCrop(size)
    return v2.Compose([v2.Resize(round(RESIZE * size)), v2.CenterCrop(size)])


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, draw by draw."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top, width, height = self._box(image.width, image.height)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _box(self, full_width: int, full_height: int) -> tuple[int, int, int, int]:
        low, high = torch.tensor(RATIO).log().tolist()
        for _ in range(TRIES):
            area = full_width * full_height * torch.empty(1).uniform_(*AREA).item()
            ratio = torch.empty(1).uniform_(low, high).exp().item()
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= full_width and 0 < height <= full_height:
                top = int(torch.randint(full_height - height + 1, (1,)))
                left = int(torch.randint(full_width - width + 1, (1,)))
                return left, top, width, height
        narrow, wide = RATIO
        width = min(full_width, round(full_height * wide))
        height = min(full_height, round(full_width / narrow))
        return (full_width - width) // 2, (full_height - height) // 2, width, height


@dataclass(frozen=True)
class CenterCrop:
    """torchvision's Resize and CenterCrop."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        short, shorter = min(image.size), round(RESIZE * self.size)
        width, height = (int(shorter * side / short) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return image.crop((left, top, left + self.size, top + self.size))
