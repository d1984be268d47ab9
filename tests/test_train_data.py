"""Sets of image files: real JPEG and PNG files through the real loader."""

from __future__ import annotations

import csv
import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rpg_fast.train import decode
from rpg_fast.train.checkpoint import load_checkpoint
from rpg_fast.train.cli import main
from rpg_fast.train.config import TrainConfig, UserError
from rpg_fast.train.data import Batches, Dataset, explain_lost_worker
from rpg_fast.train.distributed import ALONE, Team
from rpg_fast.train.folder import MEAN, STD, default_workers, load_folder
from rpg_fast.train.loop import Trainer
from rpg_fast.train.run import Run, load_data
from rpg_fast.train.throughput import Meter, Throughput

CLASSES = ("cat", "dog", "newt")
SIZE = 16
Rendered = list[tuple[Tensor, Tensor]]


def picture(number: int, label: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth coloured image; `label` makes one colour dominate."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 100, (4, 5, 3))
    pixels[..., label % 3] += 130
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def make_tree(root: Path, *, train: int = 5, val: int = 3, test_name: str = "val") -> Path:
    """JPEG and PNG files of different sizes and modes, some in folders within the class's."""
    number = 0
    for split, count in (("train", train), (test_name, val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            (folder / "more").mkdir(parents=True)
            for i in range(count):
                image = picture(number, label, size=(24 + 7 * (number % 5), 20 + 5 * (number % 7)))
                if i == 1:
                    image.convert("L").save(folder / f"{i}.png")
                elif i == 2:
                    image.save(folder / "more" / f"{i}.JPG", "JPEG", progressive=True)
                else:
                    image.save(folder / f"{i}.jpeg", quality=90)
                number += 1
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def own_tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "set")


def load(path: Path, workers: int = 0, **options: object) -> Dataset:
    return load_folder(path, image_size=SIZE, workers=workers, **options)  # type: ignore[arg-type]


def training(data: Dataset, seed: int = 0, batch: int = 4, **options: object) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return Batches(data, data.train, batch, generator=generator, **options)  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-60])


def assert_same(first: Rendered, second: Rendered) -> None:
    assert len(first) == len(second)
    for (x, y), (other_x, other_y) in zip(first, second, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def images_of(batches: Rendered) -> Tensor:
    return torch.cat([images for images, _ in batches])


def test_a_folder_is_a_set(tree: Path) -> None:
    data = load(tree)
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 3, SIZE)
    assert (len(data.train), len(data.test)) == (15, 9)
    assert data.name == f"folder:{tree}"
    batches = list(Batches(data, data.test, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert load_folder(tree).image_size == 224
    images, _ = next(iter(Batches(load_folder(tree, workers=0), load_folder(tree, workers=0).test, 2)))
    assert images.shape == (2, 3, 224, 224)


def test_evaluation_images_are_the_standardised_middle(tree: Path) -> None:
    data = load(tree)
    images, _ = next(iter(Batches(data, data.test, 3, dtype=torch.float64)))
    assert images.dtype == torch.float64
    for image, file in zip(images, ("0.jpeg", "1.png", "more/2.JPG"), strict=True):
        picture = Image.open(tree / "val" / "cat" / file).convert("RGB")
        scale = round(SIZE * 256 / 224) / min(picture.size)
        resized = picture.resize([int(side * scale + 1e-9) for side in picture.size], Image.Resampling.BILINEAR)
        left, top = (round((side - SIZE) / 2) for side in resized.size)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[:, top : top + SIZE, left : left + SIZE]
        expected = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(image, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_lie_as_asked_for(
    tree: Path, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    data = load(tree, workers=1).to(device)
    for batches in (training(data, memory_format=memory_format, dtype=dtype), Batches(data, data.test, 4)):
        for images, labels in batches:
            assert images.device.type == labels.device.type == device.type
            assert labels.dtype == torch.int64
            wanted = (memory_format, dtype) if batches.generator else (torch.contiguous_format, torch.float32)
            assert images.is_contiguous(memory_format=wanted[0])
            assert images.dtype == wanted[1]
        batches.close()


def test_every_device_gets_the_same_images(tree: Path, device: torch.device) -> None:
    here, there = load(tree, workers=2), load(tree, workers=2).to(device)
    for (x, y), (other_x, other_y) in zip(training(here), training(there), strict=True):
        torch.testing.assert_close(x, other_x.cpu(), rtol=1e-6, atol=1e-6)
        assert torch.equal(y, other_y.cpu())


def test_passes_depend_on_the_generator_alone(tree: Path) -> None:
    """Not on the workers, nor on torch's own random numbers, which no pass draws from or changes."""
    passes = {}
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        batches = training(load(tree, workers), seed=5)
        state = torch.get_rng_state()
        passes[workers] = [list(batches), list(batches)]
        assert torch.equal(torch.get_rng_state(), state)
        batches.close()
    for workers in (1, 2):
        assert_same(passes[0][0], passes[workers][0])
        assert_same(passes[0][1], passes[workers][1])
    assert not torch.equal(images_of(passes[0][0]), images_of(passes[0][1]))
    other = list(training(load(tree), seed=6))
    assert not torch.equal(images_of(passes[0][0]), images_of(other))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_goes_on_from_any_batch(tree: Path, workers: int) -> None:
    whole = training(load(tree, workers=workers), batch=4)
    start = whole.generator.get_state()
    expected, following = list(whole), list(whole)
    for first in range(4):
        resumed = training(load(tree, workers=workers), seed=99, batch=4)
        resumed.generator.set_state(start)
        assert_same(list(resumed.iterate(first)), expected[first:])
        assert_same(list(resumed), following)
        resumed.close()


def test_a_pass_may_be_left_in_the_middle(tree: Path) -> None:
    batches = training(load(tree, workers=2), batch=2)
    start = batches.generator.get_state()
    next(iter(batches))
    batches.generator.set_state(start)
    assert_same(list(batches), list(training(load(tree), batch=2)))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_every_batch(tree: Path, world: int) -> None:
    """Every image comes out as on one rank, whatever the number of ranks."""
    data = load(tree)
    alone = list(training(data, batch=5))
    ranks = [list(training(data, batch=5, rank=rank, world=world)) for rank in range(world)]
    joined = [
        (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for parts in zip(*ranks, strict=True)
    ]
    assert_same(alone, joined)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("batch", [2, 4, 9, 100])
def test_evaluation_counts_every_image_once(tree: Path, world: int, batch: int) -> None:
    data = load(tree)
    ranks = [Batches(data, data.test, batch, rank=rank, world=world) for rank in range(world)]
    assert len({len(list(batches)) for batches in ranks}) == 1  # a model with collectives does not wait for ever
    seen = images_of([batch for batches in ranks for batch in batches]).flatten(1)
    expected = images_of(list(Batches(data, data.test, 9))).flatten(1)
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, expected.tolist()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_fatal_by_its_name(own_tree: Path, workers: int) -> None:
    bad = own_tree / "train" / "dog" / "0.jpeg"
    truncate(bad)
    with pytest.raises(UserError, match="image file is truncated") as caught:
        list(training(load(own_tree, workers), batch=5))
    assert str(bad) in str(caught.value)
    assert "--bad-images skip" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_skipped_by_choice(
    own_tree: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = load(own_tree)
    bad = [own_tree / "train" / "dog" / "0.jpeg", own_tree / "val" / "newt" / "more" / "2.JPG"]
    expected = list(Batches(whole, whole.test, 4))
    for file in bad:
        truncate(file)
    data = load(own_tree, workers, bad_images="skip")

    batches = training(data, batch=5)  # the next dog takes its place
    first, second = list(batches), list(batches)
    assert torch.cat([labels for _, labels in first]).bincount().tolist() == [5, 5, 5]
    assert all(len(labels) == 5 for _, labels in first + second)
    assert list(batches.bad_images) == [str(bad[0])]
    batches.close()
    again = training(load(own_tree, 1 - workers // 2, bad_images="skip"), batch=5)
    assert_same(first, list(again))
    again.close()
    assert capfd.readouterr().err.count(f"skipped an image that cannot be read, {bad[0]}: image file is trun") == 2

    evaluation = Batches(data, data.test, 4)
    left = list(evaluation)
    assert [len(labels) for _, labels in left] == [4, 4, 0]
    assert torch.equal(images_of(left), images_of(expected)[:8])
    assert dict(evaluation.bad_images).keys() == {str(bad[1])}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("<html>not found</html>"), "not an image"),
        (lambda path: path.write_bytes(os.urandom(3000)), "not an image"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] if path.suffix == ".jpeg" else b""), "truncated"),
    ],
    ids=["empty", "page", "noise", "link", "folder", "one-byte"],
)
def test_unreadable_files_say_why(own_tree: Path, damage: Callable[[Path], object], reason: str) -> None:
    data, bad = load(own_tree, bad_images="skip"), own_tree / "val" / "cat" / "0.jpeg"
    if reason == "truncated":
        picture(0).save(bad, "JPEG", progressive=True)
    damage(bad)
    batches = Batches(data, data.test, 4)
    assert sum(len(labels) for _, labels in batches) == 8
    assert reason in batches.bad_images[str(bad)]


def test_a_png_with_wrong_bits_is_found(own_tree: Path) -> None:
    bad = own_tree / "val" / "cat" / "1.png"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 255
    bad.write_bytes(content)
    data = load(own_tree, bad_images="skip")
    batches = Batches(data, data.test, 4)
    list(batches)
    assert list(batches.bad_images) == [str(bad)]


def test_a_set_without_a_readable_image_is_fatal_even_so(own_tree: Path) -> None:
    for file in (own_tree / "train").rglob("*.*"):
        truncate(file)
    with pytest.raises(UserError, match=r"100 images in a row cannot be read, the last is .*truncated"):
        list(training(load(own_tree, bad_images="skip")))


def test_a_decoder_travels_to_processes_that_are_not_forked(tree: Path) -> None:
    decoder = decode.Decoder(load(tree).train.files, SIZE, skip_bad=False)
    task = decode.Task([3, 9], seed=1)
    here, there = decoder[task], pickle.loads(pickle.dumps(decoder))[task]
    assert torch.equal(here.pixels, there.pixels)
    assert here.pixels.shape == (2, SIZE, SIZE, 3)
    assert here.labels.tolist() == there.labels.tolist() == [0, 1]


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "deep.png")
    read = np.asarray(decode.read_image(str(tmp_path / "deep.png")))
    assert np.abs(read - (grey / 257)[..., None]).max() <= 1
    colours = picture(3)
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "png"), ("LA", "png"), ("1", "png"), ("CMYK", "jpeg")):
        colours.convert(mode).save(tmp_path / f"{mode}.{suffix}")
        image = decode.read_image(str(tmp_path / f"{mode}.{suffix}"))
        assert (image.mode, image.size) == ("RGB", colours.size)


def test_crops_have_the_published_distribution() -> None:
    crop = decode.RandomCrop(8)
    boxes = torch.tensor([crop._box(350, 350) for _ in range(2000)]).double()
    left, top, width, height = boxes.unbind(1)
    assert (left + width).max() <= 350
    assert (top + height).max() <= 350
    assert min(left.min(), top.min()) == 0
    area, ratio = width * height / 350**2, width / height
    assert area.min() > 0.07
    assert area.max() > 0.9
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    assert abs(ratio.log().mean()) < 0.03
    assert crop._box(1000, 10) == (493, 0, 13, 10)  # nothing fits: the middle
    assert crop._box(10, 1000) == (0, 493, 10, 13)


def test_pixels_are_the_same_with_and_without_torchvision() -> None:
    pytest.importorskip("torchvision.transforms.v2", exc_type=Exception)
    theirs = decode.training_transform(SIZE), decode.evaluation_transform(SIZE)
    ours = decode.RandomCrop(SIZE), decode.CenterCrop(SIZE)
    assert not {type(transform) for transform in theirs} & {type(transform) for transform in ours}
    for number, size in enumerate([(40, 30), (31, 77), (18, 18), (16, 16), (9, 11), (300, 4), (4, 300)] * 6):
        image = picture(number, size=size)
        for their, our in zip(theirs, ours, strict=True):
            torch.manual_seed(number)
            expected, state = np.asarray(their(image)), torch.get_rng_state()
            torch.manual_seed(number)
            assert np.array_equal(np.asarray(our(image)), expected), size
            assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_mirrors_half_of_the_images_and_differs_by_image(own_tree: Path) -> None:
    for file in (own_tree / "train").rglob("*.*"):  # all alike, so that only the augmentation differs
        picture(0).save(file, "PNG" if file.suffix == ".png" else "JPEG")
    images = images_of(list(training(load(own_tree), batch=5)))
    assert len(torch.unique(images.flatten(1), dim=0)) >= 14


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: Path(root.with_name("nothing")), "there is no folder {root}"),
        (lambda root: root / "train" / "cat" / "0.jpeg", "{root} is a file, not a folder of images"),
        (lambda root: root / "train", "{root} has no folder train: wanted are {root}/train/CLASS/IMAGE and"),
        (lambda root: drop(root, "val"), "{root} has neither a folder val nor a folder test"),
        (lambda root: drop(root, "train/cat/*", "train/dog/*", "train/newt/*"), "the class cat has no images (.jpeg,"),
        (lambda root: drop(root, "train/*"), "{root}/train has no folders of classes: wanted is {root}/train/CLASS"),
        (lambda root: drop(root, "train/cat", "train/dog"), "{root}/train has one class only, newt"),
        (lambda root: drop(root, "val/cat/*"), "the class cat has no images"),
        (
            lambda root: drop(root, "val/dog"),
            "{root}/train and {root}/val differ in their classes: dog only in {root}/",
        ),
        (lambda root: drop(root, "train/newt"), "{root}/val and {root}/train differ in their classes: newt only in"),
    ],
    ids=["missing", "file", "no-train", "no-val", "empty", "no-classes", "one-class", "empty-class", "train", "val"],
)
def test_folders_that_are_no_sets(own_tree: Path, change: Callable[[Path], Path | None], text: str) -> None:
    root = change(own_tree) or own_tree
    with pytest.raises(UserError) as caught:
        load(root)
    assert text.format(root=root) in str(caught.value)


def drop(root: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in root.glob(pattern):
            for file in sorted([path, *path.rglob("*")], reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()


def test_a_folder_that_cannot_be_listed_is_named(own_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"cannot list {own_tree}/train: Permission denied"):
        load(own_tree)


def test_other_files_are_told_and_hidden_ones_are_not(own_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_tree / "train" / "cat" / "notes.txt").touch()
    (own_tree / "train" / "cat" / ".hidden.jpeg").touch()
    (own_tree / "train" / ".cache").mkdir()
    (own_tree / "train" / "dog" / "loop").symlink_to(own_tree / "train" / "dog")
    assert len(load(own_tree).train) == 15
    told = capsys.readouterr().err
    assert told == f"rpg-fast: 1 files below {own_tree}/train are no images by their names, the first is " + (
        f"{own_tree}/train/cat/notes.txt\n"
    )


def test_test_stands_in_for_val(tmp_path: Path) -> None:
    assert len(load(make_tree(tmp_path / "set", test_name="test")).test) == 9


def test_too_few_images(tree: Path) -> None:
    data = load(tree)
    with pytest.raises(ValueError, match=f"folder:{tree} has 15 training images for 16 processes: too few"):
        training(data, batch=16, world=16)
    with pytest.raises(ValueError, match="the batch size, 4, is smaller than the number of processes, 5"):
        training(data, batch=4, world=5)
    with pytest.raises(ValueError, match="the batch size, 16, is larger than the training set of folder:"):
        training(data, batch=16)


def test_names_of_any_bytes(own_tree: Path) -> None:
    name = os.fsdecode(b"gr\xc3\xbcn \xff.png")
    picture(1).save(own_tree / "train" / "cat" / "z.png")
    (own_tree / "train" / "cat" / "z.png").rename(own_tree / "train" / "cat" / name)
    data = load(own_tree)
    assert data.train.files.path(4) == str(own_tree / "train" / "cat" / name)
    assert sum(len(labels) for _, labels in training(data)) == 16


def test_workers_outlive_a_signal_to_the_whole_job(tree: Path) -> None:
    batches = training(load(tree, workers=1), batch=1)
    seen = [next(iterator := iter(batches))]
    (worker,) = batches._reader._loader._iterator._workers
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    assert_same(seen + list(iterator), list(training(load(tree), batch=1)))
    batches.close()
    del iterator
    worker.join(10)
    assert worker.exitcode == 0


def test_a_killed_worker_is_one_clear_line(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def die(path: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(decode, "read_image", die)
    options = ("--image-size=16", "--width=4", "--epochs=3", "--batch-size=5", "--update-every=2", "--device=cpu")
    assert run("train", f"--data=folder:{tree}", "--workers=1", *options, f"--out={tmp_path / 'run'}") == 1
    told = capfd.readouterr().err.strip()
    assert told.startswith("rpg-fast train: error: a process that decodes images has ended: DataLoader worker (pid")
    assert len(told.splitlines()) == 1
    assert explain_lost_worker(RuntimeError("CUDA out of memory")) is None


def test_throughput_tells_waiting_from_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def come(waits: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
        for wait in waits:
            clock[0] += wait
            yield torch.zeros(0), torch.zeros(10)

    meter = Meter(torch.device("cpu"))
    assert meter.read().images == 0
    for _ in meter.watch(come([5.0, 1.0, 2.0])):
        clock[0] += 3.0  # the step
    found = meter.read()
    assert found == Throughput(images=30, seconds=12.0, waiting=3.0, startup=5.0)
    assert (found.images_per_second, found.waiting_fraction) == (2.5, 0.25)
    assert str(found) == "2 images/s, 25.0% of the time waiting for data: data bound; first batch after 5.0 s"
    for _ in meter.watch(come([0.0, 0.0])):
        clock[0] += 1.0
    assert str(meter.read()).startswith("10 images/s, 0.0% of the time waiting for data: compute bound")


def test_throughput_of_a_pass(tree: Path, device: torch.device) -> None:
    batches = training(load(tree, workers=1).to(device), batch=5)
    list(batches)
    found = batches.throughput()
    assert found.images == 15
    assert 0 < found.waiting <= found.seconds
    assert found.startup > 0


def test_default_workers_leave_a_core() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_workers() == max(1, min(16, cores - 1))
    assert default_workers(10 * cores) == 1


def test_the_processes_of_a_machine_share_its_cores(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert [default_workers(local_world) for local_world in (1, 2, 4, 8, 16, 32)] == [15, 7, 3, 1, 1, 1]
    config = TrainConfig(data=f"folder:{tree}")
    assert load_data(config, local_world=4).train.workers == 3  # type: ignore[attr-defined]
    assert load_data(replace(config, workers=9), local_world=4).test.workers == 9  # type: ignore[attr-defined]

    seen: list[int] = []
    monkeypatch.setattr("rpg_fast.train.run.load_data", lambda config, local_world: seen.append(local_world) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run(config, replace(ALONE, local_world=4))
    assert seen == [4]


def test_options_of_folders(tmp_path: Path) -> None:
    config = TrainConfig(data=f"folder:{tmp_path}/birds", workers=0, bad_images="skip")
    assert config.name == "birds-resnet20-98"
    assert TrainConfig.from_dict(config.to_dict()) == config
    for options, text in (
        ({"data": "folder:"}, "--data 'folder:' is unknown; known are digits, synthetic, folder:PATH"),
        ({"data": "folder:x", "workers": -1}, "--workers must be at least 0, got -1"),
        ({"data": "folder:x", "bad_images": "maybe"}, "--bad-images 'maybe' is unknown; known are stop, skip"),
        ({"data": "folder:x", "classes": 3}, "--classes is for --data synthetic"),
        ({"workers": 2}, "--workers is for --data folder:PATH, not for digits"),
    ):
        with pytest.raises(UserError) as caught:
            TrainConfig(**options)
        assert text in str(caught.value)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_train_and_evaluate_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)
    monkeypatch.chdir(make_tree(tmp_path / "set", train=16, val=6))
    options = ("--image-size=16", "--width=4", "--epochs=3", "--batch-size=8", "--workers=1", "--sparsity=0.5")
    out = tmp_path / "run"
    assert run("train", "--data=folder:.", *options, "--no-dense-baseline", f"--out={out}", "--device=cpu") == 0
    printed = capsys.readouterr().out
    assert f"on folder:{tmp_path / 'set'} (48 training and 18 test images)" in printed
    assert re.search(r"images/s \d+  waiting for data \d+\.\d%", printed)
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", out, "--device=cpu") == 0
    accuracy = printed.split("sparse accuracy")[1].split()[0]
    assert f"accuracy   {accuracy}" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_within_an_epoch_ends_as_if_it_had_not_been(
    own_tree: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)
    options = ("--image-size=16", "--width=4", "--epochs=4", "--batch-size=4", "--update-every=3", "--sparsity=0.5")
    train = ("train", f"--data=folder:{own_tree}", *options, "--no-dense-baseline", "--checkpoint-every=4")
    assert run(*train, f"--out={tmp_path / 'whole'}", "--device=cpu", "--workers=0") == 0

    step = Trainer.train_step

    def stopping(trainer: Trainer, images: Tensor, labels: Tensor) -> object:
        if trainer.step == 7:  # the second of the third epoch: three batches in each
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, images, labels)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    out = tmp_path / "stopped"
    assert run(*train, f"--out={out}", "--device=cpu", f"--workers={workers}") == 0
    monkeypatch.setattr(Trainer, "train_step", step)
    stopped = load_checkpoint(out / "checkpoint.pt")
    assert stopped["trainer"]["step"] == 8
    assert run("train", f"--resume={out}") == 0
    whole, resumed = (load_checkpoint(path / "checkpoint.pt") for path in (tmp_path / "whole", out))
    assert whole["trainer"]["step"] == resumed["trainer"]["step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: (root / "train/cat/0.jpeg").unlink(), "(train: 14 now, 15 then)"),
        (lambda root: picture(1).save(root / "val/dog/new.png"), "(test: 10 now, 9 then)"),
        (lambda root: (root / "train/cat/0.jpeg").rename(root / "train/cat/00.jpg"), "(train: 15 others now, 15 then)"),
        (lambda root: (root / "train/cat/0.jpeg").rename(root / "train/dog/9.jpeg"), "(train: 15 others now, 15 then)"),
    ],
    ids=["removed", "added", "renamed", "another class"],
)
def test_other_images_are_noticed_by_resume(
    change: Callable[[Path], object],
    told: str,
    own_tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)
    options = ("--image-size=16", "--width=4", "--epochs=2", "--batch-size=5", "--update-every=2", "--sparsity=0.5")
    out, data = tmp_path / "run", f"--data=folder:{own_tree}"
    assert run("train", data, *options, "--no-dense-baseline", "--workers=0", "--device=cpu", f"--out={out}") == 0
    (own_tree / "train/cat/notes.txt").touch()  # no image
    assert run("train", f"--resume={out}") == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    change(own_tree)
    capsys.readouterr()
    assert run("train", f"--resume={out}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    changed = f"the images in folder:{own_tree} are not those that the run in {out} began with {told}"
    assert line == f"rpg-fast train: error: {changed}: it goes on exactly with the same ones only"
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_processes_that_find_different_images_are_told(tree: Path) -> None:
    data = load(tree)
    other = replace(data, test=replace(data.test, files=data.train.files))  # type: ignore[type-var]

    class TwoMachines(Team):
        def gather(self, value: Any) -> list[Any]:
            return [value, other.record()]

    lonely = object.__new__(Run)
    lonely.team, lonely.dataset = TwoMachines(), data
    with pytest.raises(UserError, match=r"different images in folder:.*: test: 15 on rank 1, 9 on rank 0"):
        lonely._agreed_record()


def test_skipped_images_are_told_at_the_end_and_kept_in_a_file(
    own_tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)
    bad = [own_tree / "train" / "cat" / "0.jpeg", own_tree / "val" / "dog" / "0.jpeg"]
    for file in bad:
        truncate(file)
    options = ("--image-size=16", "--width=4", "--epochs=3", "--batch-size=5", "--update-every=2", "--sparsity=0.5")
    out = tmp_path / "run"
    words = (*options, "--no-dense-baseline", "--bad-images=skip", "--device=cpu", f"--out={out}")
    assert run("train", f"--data=folder:{own_tree}", "--workers=1", *words) == 0
    printed = capfd.readouterr().out
    assert re.search(
        r"^throughput +[\d,]+ images/s, \d+\.\d% of the time waiting for data: (data|compute) bound$", printed, re.M
    )
    assert re.search(r"^sparse  epoch   1/3 .* waiting for data \d+\.\d% \((data|compute) bound\)$", printed, re.M)
    assert f"bad images        2 could not be read, all of them in {out / 'bad_images.csv'}\n" in printed
    assert all(f" {file}: image file is truncated" in printed for file in bad)
    with open(out / "bad_images.csv", newline="") as table:
        assert [row["file"] for row in csv.DictReader(table)] == sorted(map(str, bad))
    assert run("train", f"--resume={out}") == 0  # it has ended: nothing is read any more
    assert "2 could not be read" in capfd.readouterr().out


def test_a_bad_image_ends_training_in_one_line(
    own_tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    truncate(own_tree / "train" / "cat" / "0.jpeg")
    options = ("--image-size=16", "--width=4", "--epochs=3", "--batch-size=5", "--update-every=2", "--device=cpu")
    data = f"--data=folder:{own_tree}"
    assert run("train", data, *options, "--no-dense-baseline", f"--out={tmp_path / 'run'}") == 2
    told = capfd.readouterr().err
    assert told.startswith(f"rpg-fast train: error: cannot read the image {own_tree}/train/cat/0.jpeg: image file is")
    assert "Traceback" not in told
    assert run("train", f"--data=folder:{own_tree}/val", f"--out={tmp_path / 'no'}") == 2
    assert not (tmp_path / "no").exists()
