"""Image classification sets that live in memory on the training device; batches are rendered there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

DATASETS = ("digits", "synthetic")
SYNTHETIC_CELLS = 8  # a synthetic image is a coarse pattern of 8x8 cells, enlarged when a batch is made


@dataclass(frozen=True)
class Split:
    """Images as stored [N, C, h, w] float32, standardised, and their labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `image_size` is the side in pixels at which batches are rendered."""

    name: str
    train: Split
    test: Split
    num_classes: int
    image_size: int
    max_shift: int  # random shifts of the training images, in stored pixels

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device) -> Dataset:
        """The same data with both splits on `device`."""
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
        train=Split(images[~is_test], labels[~is_test]),
        test=Split(images[is_test], labels[is_test]),
        num_classes=10,
        image_size=image_size or 8,
        max_shift=1,
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

    def split(count: int) -> Split:
        labels = torch.arange(count) % num_classes
        images = patterns[labels] + noise * torch.randn(count, *shape, generator=generator)
        return Split(images / (1 + noise**2) ** 0.5, labels)

    train, test = split(train_images), split(test_images)
    return Dataset("synthetic", train, test, num_classes, image_size or 32, max_shift=0)


class Batches:
    """Iterates over one split: `for images, labels in Batches(...)`, images [B, C, image_size, image_size] float32.

    With a `generator` (of the CPU) the order is drawn anew in every pass, images are shifted by up to the set's
    `max_shift` pixels each way, and an incomplete last batch is dropped; without one the order is fixed, nothing is
    shifted and every image comes exactly once.

    Of `world` processes that draw alike, each gets its `rank`-th part of every batch: together they see each image
    once, and the batches do not depend on their number. A part may be empty where a batch has fewer images.

    Raises:
        ValueError: `batch_size` is below 1, or, with a `generator`, larger than the split.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        if generator is not None and batch_size > len(split):
            raise ValueError(
                f"the batch size, {batch_size}, is larger than the training set of {dataset.name}: {len(split)} images"
            )
        self.dataset, self.split, self.batch_size = dataset, split, batch_size
        self.generator, self.memory_format = generator, memory_format
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        if self.generator is not None:
            return len(self.split) // self.batch_size
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def iterate(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass from batch `first` on, for a pass that was interrupted: set the generator back to its start."""
        count, device = len(self.split), self.split.labels.device
        order, shifts = torch.arange(count), torch.zeros(count, 2, dtype=torch.int64)
        if self.generator is not None:
            order = torch.randperm(count, generator=self.generator)
            reach = self.dataset.max_shift
            shifts = torch.randint(-reach, reach + 1, (count, 2), generator=self.generator)
        order, shifts = order.to(device), shifts.to(device)
        for batch in range(first, len(self)):
            here = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            index = order[here].tensor_split(self.world)[self.rank]  # [B]
            images = self.split.images[index]
            if self.generator is not None and self.dataset.max_shift > 0:
                images = shift_images(images, shifts[here].tensor_split(self.world)[self.rank])
            yield self._render(images), self.split.labels[index]

    def _render(self, images: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, image_size, image_size]
        size = self.dataset.image_size
        if images.shape[-1] != size:
            images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        return images.contiguous(memory_format=self.memory_format)


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
