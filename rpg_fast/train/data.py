"""Image classification sets and their batches; small sets live in memory on the training device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .throughput import Meter, Throughput

DATASETS = ("digits", "synthetic")
FOLDER = "folder:"  # and a path: a set of image files
SYNTHETIC_CELLS = 8  # a synthetic image is a coarse pattern of 8x8 cells, enlarged when a batch is made


class Reader(ABC):
    """Turns the numbers of images into batches on the device."""

    bad_images: Mapping[str, str] = MappingProxyType({})  # images left out so far: file name -> reason

    @abstractmethod
    def read(
        self, order: Tensor, parts: Iterable[Tensor], generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [b, C, H, W] and labels [b] of each part on the device.

        Args:
            order: the numbers of all images, int64 [N] on the CPU.
            parts: places in `order`, int64 [b] on the CPU.
            generator: what is random depends on its state at the beginning and on the image alone; None: nothing is.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the processes that the reader has started, if any."""


class Split(ABC):
    """The images of one part of a set, numbered from 0."""

    device: torch.device
    in_channels: int

    @abstractmethod
    def __len__(self) -> int: ...

    def record(self) -> dict[str, Any]:
        """What tells these images from others, as plain values: how many there are and, of files, a hash of names."""
        return {"images": len(self)}

    @abstractmethod
    def to(self, device: torch.device) -> Split:
        """The same images, for batches on `device`."""

    @abstractmethod
    def reader(self, image_size: int, memory_format: torch.memory_format, dtype: torch.dtype) -> Reader:
        """A reader whose images have that size, memory format and dtype."""


@dataclass(frozen=True)
class MemorySplit(Split):
    """Images as stored [N, C, h, w] float32, standardised, and their labels [N] int64; in training the images are
    shifted by up to `max_shift` stored pixels each way."""

    images: Tensor
    labels: Tensor
    max_shift: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.labels.device

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        return self.images.shape[1]

    def to(self, device: torch.device) -> MemorySplit:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def reader(self, image_size: int, memory_format: torch.memory_format, dtype: torch.dtype) -> Reader:
        return _MemoryReader(self, image_size, memory_format, dtype)


class _MemoryReader(Reader):
    def __init__(self, split: MemorySplit, image_size: int, memory_format: torch.memory_format, dtype: torch.dtype):
        self.split, self.image_size, self.memory_format, self.dtype = split, image_size, memory_format, dtype

    def read(
        self, order: Tensor, parts: Iterable[Tensor], generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        split, reach, shifts = self.split, self.split.max_shift, None
        if generator is not None and reach > 0:
            shifts = torch.randint(-reach, reach + 1, (len(split), 2), generator=generator).to(split.device)
        order = order.to(split.device)
        for part in parts:
            places = self._at_once(part)  # [b]
            index = order[places]
            images = split.images[index]
            if shifts is not None:
                images = shift_images(images, shifts[places])
            yield self._render(images), split.labels[index]

    def _at_once(self, places: Tensor) -> Tensor:
        """Places [b] on the device, for which the host does not wait: a copy from memory that is not pinned waits for
        all that the device has been given."""
        if self.split.device.type == "cuda":
            places = places.pin_memory()
        return places.to(self.split.device, non_blocking=True)

    def close(self) -> None:
        """Nothing to end."""

    def _render(self, images: Tensor) -> Tensor:  # [b, C, h, w] -> [b, C, image_size, image_size]
        size = self.image_size
        if images.shape[-1] != size:
            images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        return images.to(self.dtype, memory_format=self.memory_format)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `image_size` is the side in pixels at which batches are rendered."""

    name: str
    train: Split
    test: Split
    num_classes: int
    image_size: int

    @property
    def in_channels(self) -> int:
        return self.train.in_channels

    def record(self) -> dict[str, dict[str, Any]]:
        """`Split.record` of both splits."""
        return {"train": self.train.record(), "test": self.test.record()}

    def to(self, device: torch.device) -> Dataset:
        """The same data for batches on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load_digits(image_size: int | None = None) -> Dataset:
    """Handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes (Alpaydin and Kaynak 1998; in scikit-learn).

    The split is fixed: in the set's own order every fourth image of a class is a test image (445 of them).
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)  # [1797, 1, 8, 8], 0 to 16
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero().flatten()[3::4]] = True
    mean, std = images[~is_test].mean(), images[~is_test].std()
    images = (images - mean) / std
    return Dataset(
        "digits",
        train=MemorySplit(images[~is_test], labels[~is_test], max_shift=1),
        test=MemorySplit(images[is_test], labels[is_test]),
        num_classes=10,
        image_size=image_size or 8,
    )


def make_synthetic(
    *,
    image_size: int | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    train_images: int = 1024,
    test_images: int = 256,
    noise: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Images that can be learned, of any size and number of classes, without a download.

    Every class has a random pattern of 8x8 cells; an image is its class's pattern plus Gaussian noise of standard
    deviation `noise`, enlarged bilinearly to `image_size` (default 32). One stored image takes 256 bytes a channel, so
    sets of ImageNet's shape fit in memory. Labels are balanced; the same arguments give the same data.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (in_channels, SYNTHETIC_CELLS, SYNTHETIC_CELLS)
    patterns = torch.randn(num_classes, *shape, generator=generator)

    def split(count: int) -> MemorySplit:
        labels = torch.arange(count) % num_classes
        images = patterns[labels] + noise * torch.randn(count, *shape, generator=generator)
        return MemorySplit(images / (1 + noise**2) ** 0.5, labels)

    train, test = split(train_images), split(test_images)
    return Dataset("synthetic", train, test, num_classes, image_size or 32)


class Batches:
    """Iterates over one split: `for images, labels in Batches(...)`, on the split's device, images
    [B, C, image_size, image_size], labels [B] int64.

    With a `generator` (of the CPU) the order is drawn anew in every pass, images are augmented, and an incomplete last
    batch is dropped; without one the order is fixed, nothing is augmented and every image comes exactly once. A pass
    is a function of the generator's state at its beginning.

    Of `world` processes that draw alike, each gets its `rank`-th part of every batch: together they see each image
    once, and the batches do not depend on their number. A part may be empty where a batch has fewer images.

    Raises:
        ValueError: `batch_size` is below 1, or, with a `generator`, larger than the split or smaller than `world`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        if generator is not None and world > len(split):
            raise ValueError(f"{dataset.name} has {len(split)} training images for {world} processes: too few")
        if generator is not None and batch_size > len(split):
            raise ValueError(
                f"the batch size, {batch_size}, is larger than the training set of {dataset.name}: {len(split)} images"
            )
        if generator is not None and batch_size < world:
            raise ValueError(f"the batch size, {batch_size}, is smaller than the number of processes, {world}")
        self.dataset, self.split, self.batch_size = dataset, split, batch_size
        self.generator, self.rank, self.world = generator, rank, world
        self._reader = split.reader(dataset.image_size, memory_format, dtype)
        self._meter = Meter(split.device)

    def __len__(self) -> int:
        if self.generator is not None:
            return len(self.split) // self.batch_size
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def iterate(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass from batch `first` on, for a pass that was interrupted: set the generator back to its start."""
        count = len(self.split)
        order = torch.arange(count) if self.generator is None else torch.randperm(count, generator=self.generator)
        parts = (
            torch.arange(start, min(start + self.batch_size, count)).tensor_split(self.world)[self.rank]
            for start in range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        )
        return self._meter.watch(self._reader.read(order, parts, self.generator))

    def throughput(self) -> Throughput:
        """How fast this process's part of the last pass, or of the present one so far, was. Waits for the device."""
        return self._meter.read()

    @property
    def bad_images(self) -> Mapping[str, str]:
        """The files that this process could not read and has left out or replaced so far, with the reasons."""
        return self._reader.bad_images

    def close(self) -> None:
        """Ends the processes that decode; the next pass starts new ones."""
        self._reader.close()


def explain_lost_worker(error: RuntimeError) -> str | None:
    """What to tell of a process that decoded and was killed, as by a machine out of memory; None: something else went
    wrong. torch raises the error as soon as it knows, whatever the training is doing."""
    text = str(error).strip().splitlines() or [""]
    return f"a process that decodes images has ended: {text[0]}" if "DataLoader worker" in text[0] else None


def changed_images(then: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> str:
    """How two records of a data set differ, in words; empty if they do not."""
    told = []
    for split, found in now.items():
        before = then.get(split)
        if before != found:
            count = before.get("images") if isinstance(before, Mapping) else "no"
            others = " others" if count == found["images"] else ""
            told.append(f"{split}: {found['images']}{others} now, {count} then")
    return "; ".join(told)


def shift_images(images: Tensor, shifts: Tensor) -> Tensor:
    """Moves each image by its own whole number of pixels; what comes in at the border repeats the border.

    Args:
        images: [B, C, H, W].
        shifts: [B, 2] int64, down and to the right.
    """
    batch, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - shifts[:, :1]).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) - shifts[:, 1:]).clamp(0, width - 1)  # [B, W]
    index = torch.arange(batch, device=images.device)
    moved = images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return moved.permute(0, 3, 1, 2)
