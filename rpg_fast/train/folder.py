"""Image classification sets in folders: PATH/train/<class>/<image> and PATH/val/<class>/<image> (or PATH/test)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .config import LocalError, UserError
from .data import FOLDER, Dataset, Reader, Split
from .decode import Decoded, Decoder, ImageFiles, Task

BadImages = Literal["stop", "skip"]

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels, red, green, blue, from 0 to 1
STD = (0.229, 0.224, 0.225)
MAX_WORKERS = 16
BATCHES_AHEAD = 2  # that each process decodes


def load_folder(
    path: str | Path,
    *,
    image_size: int | None = None,
    workers: int | None = None,
    bad_images: BadImages = "stop",
    local_world: int = 1,
) -> Dataset:
    """A set of image files, its classes in the order of their names.

    Training images are random crops, mirrored half of the time; test images are cut out of the middle (`decode`). All
    are standardised with ImageNet's mean and standard deviation.

    Args:
        path: holds a folder `train` and one of `val` and `test` (`val` where there are both), each with one folder a
            class, the images at any depth below. Files and folders whose names begin with a dot are ignored.
        image_size: side of the images in pixels (default 224).
        workers: processes that decode; 0: the process itself does (default: `default_workers(local_world)`).
        bad_images: "stop": an image that cannot be read ends the training. "skip": it is reported, and in training the
            next one that can be read takes its place, in evaluation it is left out.
        local_world: training processes on this machine, which share its cores.

    Raises:
        UserError: it names what is wrong with the folder.
    """
    if bad_images not in get_args(BadImages):
        raise UserError(f"--bad-images {bad_images!r} is unknown; known are {', '.join(get_args(BadImages))}")
    root = Path(path).absolute()
    if not root.is_dir():
        raise UserError(f"{root} is a file, not a folder of images" if root.exists() else f"there is no folder {root}")
    wanted = f"wanted are {root}/train/CLASS/IMAGE and {root}/val/CLASS/IMAGE"
    if not (root / "train").is_dir():
        raise UserError(f"{root} has no folder train: {wanted}")
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test is None:
        raise UserError(f"{root} has neither a folder val nor a folder test: {wanted}")
    classes = find_classes(root / "train")
    _check_same_classes(root / "train", classes, test, find_classes(test))

    def split(folder: Path) -> FolderSplit:
        count = default_workers(local_world) if workers is None else workers
        return FolderSplit(find_images(folder, classes), count, bad_images == "skip", torch.device("cpu"))

    return Dataset(
        f"{FOLDER}{root}",
        train=split(root / "train"),
        test=split(test),
        num_classes=len(classes),
        image_size=image_size or 224,
    )


def default_workers(local_world: int = 1) -> int:
    """Processes that decode for each of `local_world` training processes on this machine: the cores that they may use,
    less one for the training, shared among them, at most `MAX_WORKERS`."""
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // local_world - 1))


def find_classes(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted.

    Raises:
        UserError: there are fewer than two, or they cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
    if not classes:
        raise UserError(f"{folder} has no folders of classes: wanted is {folder}/CLASS/IMAGE")
    if len(classes) == 1:
        raise UserError(f"{folder} has one class only, {classes[0]}: there is nothing to tell apart")
    return classes


def find_images(folder: Path, classes: list[str]) -> ImageFiles:
    """All images of the classes, sorted by class and name. Says how many other files there are.

    Raises:
        UserError: a class has no images, or a folder cannot be listed.
    """
    names: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        found, rest = _walk(folder / name)
        if not found:
            kinds = f": {rest[0]} is none" if rest else ""
            raise UserError(f"the class {name} has no images ({', '.join(EXTENSIONS)}) in {folder / name}{kinds}")
        names += [os.path.relpath(file, folder) for file in found]
        labels += [label] * len(found)
        others += rest
    if others:
        _warn(f"{len(others):,} files below {folder} are no images by their names, the first is {others[0]}")
    return ImageFiles(str(folder), names, labels)


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """The images and the other files below a folder; links to folders are followed once."""

    def stop(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from error

    images: list[str] = []
    others: list[str] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        for name in sorted(files):
            if not name.startswith("."):
                (images if name.lower().endswith(EXTENSIONS) else others).append(os.path.join(here, name))
    return images, others


def _check_same_classes(train: Path, classes: list[str], test: Path, test_classes: list[str]) -> None:
    for have, lack, names in (
        (train, test, sorted(set(classes) - set(test_classes))),
        (test, train, sorted(set(test_classes) - set(classes))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{have} and {lack} differ in their classes: {', '.join(names[:3])}{more} only in {have}")


@dataclass(frozen=True)
class FolderSplit(Split):
    """Image files, decoded by `workers` processes for batches on `device`."""

    files: ImageFiles
    workers: int
    skip_bad: bool
    device: torch.device
    in_channels: int = 3

    def __len__(self) -> int:
        return len(self.files)

    def record(self) -> dict[str, Any]:
        return {"images": len(self), "names": self.files.digest()}

    def to(self, device: torch.device) -> FolderSplit:
        return replace(self, device=device)

    def reader(self, image_size: int, memory_format: torch.memory_format, dtype: torch.dtype) -> Reader:
        return _FolderReader(self, image_size, memory_format, dtype)


class _Tasks:
    """What a DataLoader asks for, anew in every pass."""

    def __init__(self) -> None:
        self.pending: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.pending)


class _FolderReader(Reader):
    """Decodes in other processes, pins the pixels where there is a GPU, and copies each batch there on a stream of its
    own while the one before is worked on."""

    def __init__(self, split: FolderSplit, image_size: int, memory_format: torch.memory_format, dtype: torch.dtype):
        self.split, self.memory_format, self.dtype = split, memory_format, dtype
        self.decoder = Decoder(split.files, image_size, skip_bad=split.skip_bad)
        self.bad_images: dict[str, str] = {}
        self.mean = torch.tensor(MEAN, device=split.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(STD, device=split.device).view(1, 3, 1, 1) * 255
        self._tasks = _Tasks()
        self._loader: DataLoader[Decoded] | None = None

    def read(
        self, order: Tensor, parts: Iterable[Tensor], generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        seed = None if generator is None else int(torch.randint(2**62, (), generator=generator))
        self._tasks.pending = (Task(order[part].tolist(), seed) for part in parts)
        if self._loader is None:
            self._loader = self._make_loader(keep_workers=generator is not None)
        decoded = self._reported(self._loader)
        return map(self._place, decoded) if self.split.device.type == "cpu" else self._copied_ahead(decoded)

    def close(self) -> None:
        self._loader = None

    def _make_loader(self, *, keep_workers: bool) -> DataLoader[Decoded]:
        several: dict[str, Any] = {}
        if self.split.workers > 0:
            several = {"persistent_workers": keep_workers, "prefetch_factor": BATCHES_AHEAD}
        return DataLoader(
            self.decoder,
            batch_size=None,  # a task is a batch already
            sampler=self._tasks,
            collate_fn=_as_it_is,
            num_workers=self.split.workers,
            pin_memory=self.split.device.type == "cuda",
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else every pass would draw from torch's own
            **several,
        )

    def _reported(self, loader: DataLoader[Decoded]) -> Iterator[Decoded]:
        for batch in loader:
            self._report(batch)
            yield batch

    def _report(self, batch: Decoded) -> None:
        """Tells what could not be read."""
        if batch.given_up:
            self.close()
            path, reason = batch.bad[-1]
            if self.split.skip_bad:
                raise LocalError(f"{len(batch.bad)} images in a row cannot be read, the last is {path}: {reason}")
            raise LocalError(f"cannot read the image {path}: {reason} (--bad-images skip goes on without it)")
        for path, reason in batch.bad:
            if path not in self.bad_images:
                self.bad_images[path] = reason
                _warn(f"skipped an image that cannot be read, {path}: {reason}")

    def _place(self, batch: Decoded) -> tuple[Tensor, Tensor]:
        pixels = batch.pixels.to(self.split.device, non_blocking=True).permute(0, 3, 1, 2)  # [b, 3, H, W], as it lies
        images = (pixels.float() - self.mean) / self.std
        images = images.to(self.dtype).contiguous(memory_format=self.memory_format)
        return images, batch.labels.to(self.split.device, non_blocking=True)

    def _copied_ahead(self, decoded: Iterator[Decoded]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches on the GPU; while one is worked on, the next is on its way."""
        stream = torch.cuda.Stream(self.split.device)
        stream.wait_stream(torch.cuda.current_stream(self.split.device))  # which made mean and std
        ahead: tuple[Tensor, Tensor] | None = None
        for batch in decoded:
            with torch.cuda.stream(stream):
                following = self._place(batch)
                arrived = stream.record_event()
            if ahead is not None:
                yield ahead
            ahead = self._hand_over(following, arrived)
        if ahead is not None:
            yield ahead

    def _hand_over(self, batch: tuple[Tensor, Tensor], arrived: torch.cuda.Event) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(self.split.device)
        current.wait_event(arrived)
        for tensor in batch:
            tensor.record_stream(current)
        return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """A signal to the whole job is for the training process, which ends its workers after it has saved. It does so by
    a second SIGTERM where need be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _warn(text: str) -> None:
    with suppress(OSError):  # a log on a full disk
        tqdm.write(f"rpg-fast: {text}", file=sys.stderr)
