"""One run from its configuration to its folder: dense baseline, sparse training, metrics, checkpoints, picture."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpg_fast._output import tell

from .checkpoint import RunFolder, load_checkpoint, reason
from .config import Stopped, TrainConfig, UserError
from .data import FOLDER, Dataset, changed_images, load_digits, make_synthetic
from .distributed import ALONE, LostProcess, Team, join
from .events import EventWriter, require_tensorboard
from .formats import read_network
from .layers import network_statistics
from .loop import EpochMetrics, Trainer, place, pruned_count
from .models import ARCHITECTURES, build_model, check_network
from .online import OnlineRun, import_wandb
from .report import draw_report
from .result import RunResult

TINY_IMAGE = 16  # pixels
SMALL_IMAGE = 64  # pixels; up to here the 7x7 stem and the max-pooling would throw too much away
MISSED = 1e-4  # a sparsity off by more is told, as "official" may end with


class Run:
    """A dense and a sparse trainer, which begin with the same weights, and the folder that they write to.

    Raises:
        UserError: an option does not fit. It is found here, before anything is written.
    """

    def __init__(self, config: TrainConfig, team: Team = ALONE):
        self.config, self.team = config, team
        if config.start_from == "pretrained" and config.pretrained is None:
            by = f"--recipe {config.recipe}" if config.recipe else "--start-from pretrained"
            raise UserError(
                f"{by} begins with trained weights: name their file with --pretrained, or --start-from random"
            )
        if config.tensorboard:
            require_tensorboard()
        if config.wandb is not None:
            import_wandb()
        self.device = team.together(lambda: choose_device(config, team))
        set_determinism(config)
        self.dataset = team.together(lambda: load_data(config, team.local_world)).to(self.device)
        self.data_record = self._agreed_record()
        choose_threads(config, self.dataset)
        self.model_arguments = model_arguments(config, self.dataset)
        torch.manual_seed(config.seed)
        model = new_model(self.model_arguments, self.dataset.image_size)
        if config.pretrained is not None:
            load_pretrained(model, Path(config.pretrained), config)
        self.initial = place(model, self.device, config)
        self.dense = self._trainer("dense", self.initial)
        self.sparse = self._trainer("sparse", self.initial)
        self.rows: dict[str, list[EpochMetrics]] = {"dense": [], "sparse": []}
        self.online = OnlineRun()
        self.bad_images: dict[str, str] = {}

    def _agreed_record(self) -> dict[str, dict[str, Any]]:
        """The record of the data, which every rank has to find alike."""
        records = self.team.gather(self.dataset.record())
        for rank, record in enumerate(records):
            changed = changed_images(records[0], record)
            if changed:
                told = changed.replace(" now", f" on rank {rank}").replace(" then", " on rank 0")
                raise UserError(f"the processes find different images in {self.dataset.name}: {told}")
        return records[0]

    def _trainer(self, name: str, model: nn.Module) -> Trainer:
        return Trainer(
            copy.deepcopy(model), self.dataset, self.config, name=name, sparse=name == "sparse", team=self.team
        )

    def train(self, folder: RunFolder) -> RunResult:
        """Trains both, each from where its checkpoint in the folder left off, and draws the picture.

        Raises:
            UserError: a checkpoint in the folder is no good, the training diverged, or another process was lost.
            Stopped: SIGTERM came, and all is saved.
        """
        config, begin = self.config, self.initial
        if self.team.leads:
            tell(self.describe(folder))
        self.bad_images = self.team.lead(folder.read_bad_images)
        if config.wandb is not None:
            self.team.lead(lambda: self.online.start(folder.path, config))
        with self.online, on_sigterm() as stop, self._losses_told(folder):
            if config.dense_baseline:
                self._fit(self.dense, folder, "dense.pt", stop)
                if config.starts_dense:
                    begin = self.dense.evaluated
                    self.sparse = self._trainer("sparse", begin)
            self._fit(self.sparse, folder, "checkpoint.pt", stop)

        before = network_statistics(begin, config.tail_energy)
        after = network_statistics(self.sparse.evaluated, config.tail_energy)
        assert self.sparse.pruner is not None
        pruned = pruned_count(self.sparse.pruner)
        reached = pruned / sum(self.sparse.pruner.masks.layout.numels)
        missed = config.sparsity if abs(reached - config.sparsity) > MISSED else None
        rows = {name: tuple(found) for name, found in self.rows.items()}
        unwritten: tuple[str, ...] = ()
        if self.team.leads:
            picture = folder.path / "report.png"
            folder.attempt(
                picture.name, lambda: draw_report(picture, config, rows["dense"], rows["sparse"], before, after)
            )
            unwritten = folder.retry()
        return RunResult(
            folder.path, rows["dense"], rows["sparse"], before, after, pruned, self.bad_images, unwritten, missed
        )

    def describe(self, folder: RunFolder) -> str:
        """What is trained on what, where, into which folder: one line."""
        size = sum(parameter.numel() for parameter in self.initial.parameters())
        images = f"{len(self.dataset.train):,} training and {len(self.dataset.test):,} test images"
        processes = f"{self.team.world} processes, each on " if self.team.world > 1 else ""
        return (
            f"{self.config.arch} ({size:,} parameters) on {self.dataset.name} ({images}), "
            f"{processes}{device_name(self.device)}, into {folder.path}"
        )

    def _fit(self, trainer: Trainer, folder: RunFolder, file: str, stop: threading.Event) -> None:
        self._restore(trainer, folder, file)
        events = EventWriter(folder.path, trainer, self.config) if self.team.leads and self.config.tensorboard else None

        def save() -> bool:
            self._collect_bad_images(trainer, folder)
            content = self._content(trainer)
            return self.team.lead(lambda: folder.save(file, content))

        def on_epoch(metrics: EpochMetrics) -> None:
            self.rows[trainer.name].append(metrics)
            self._write_metrics(folder)
            if events is not None:
                events.add_epoch(metrics)
                folder.attempt(f"tensorboard/{trainer.name}", events.write)
            self.online.add(metrics)
            save()
            folder.retry()

        def on_step() -> None:
            stopping = self.team.any(stop.is_set())
            every = self.config.checkpoint_every
            due = every is not None and trainer.step % every == 0
            if (stopping or due) and not save() and stopping:
                raise UserError(f"stopped after step {trainer.step}, but {folder.path / file} could not be written")
            if stopping:
                raise Stopped(f"stopped after step {trainer.step} of the {trainer.name} training; {go_on(folder)}")

        trainer.run(on_epoch, on_step)

    def _collect_bad_images(self, trainer: Trainer, folder: RunFolder) -> None:
        """Brings together what the processes could not read. Every rank has to call it."""
        if self.config.reads_files and self.config.bad_images == "skip":
            for bad in self.team.gather(trainer.bad_images()):
                self.bad_images |= bad
            self.bad_images = self.team.lead(lambda: folder.add_bad_images(self.bad_images))

    @contextmanager
    def _losses_told(self, folder: RunFolder) -> Iterator[None]:
        """Tells in one line, by one process, that another has ended."""
        try:
            yield
        except RuntimeError as error:
            told = self.team.explain_loss(error, f"step {self.sparse.step or self.dense.step}")
            if told is None:
                raise
            raise LostProcess(told and f"{told}; {go_on(folder)}") from error

    def _content(self, trainer: Trainer) -> dict[str, Any]:
        """What goes into a checkpoint. Every rank has to call it."""
        return {
            "state_dict": trainer.evaluated.state_dict(),
            "model": self.model_arguments,
            "config": self.config.to_dict(),
            "metrics": [asdict(row) for row in self.rows[trainer.name]],
            "trainer": trainer.state_dict(),
        }

    def _restore(self, trainer: Trainer, folder: RunFolder, file: str) -> None:
        """Takes `trainer` to its checkpoint, if there is one, and the files of the folder with it."""
        path, rows = folder.path / file, self.rows[trainer.name]
        checkpoint = self.team.lead(lambda: load_checkpoint(path) if path.exists() else None)
        if checkpoint is None:
            trainer.seed_random()
            return
        for key, value in self.model_arguments.items():
            if checkpoint["model"].get(key) != value:
                was = checkpoint["model"].get(key)
                raise UserError(f"{path} is not of this run: it is of {key} {was}, wanted {value}")
        try:
            trainer.evaluated.load_state_dict(checkpoint["state_dict"])
            trainer.load_state_dict(checkpoint["trainer"])
            rows += [EpochMetrics(**row) for row in checkpoint["metrics"]]
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not of this run: {reason(error)}") from error
        self._write_metrics(folder)

    def _write_metrics(self, folder: RunFolder) -> None:
        if self.team.leads:
            rows = [asdict(row) for row in self.rows["dense"] + self.rows["sparse"]]
            folder.write_metrics(rows, [field.name for field in fields(EpochMetrics)])


def train(config: TrainConfig, out: Path | None = None) -> RunResult | None:
    """Trains as configured into a new folder: `out`, or the next free one below runs/; in each of the processes that
    torchrun has started, or in this one. Returns the result on rank 0.

    Raises:
        UserError: an option does not fit or the folder is taken (then nothing is written), the training diverged, a
            process was lost, or the result could not be written. Stopped: SIGTERM came, and all is saved.
    """
    with join() as team:
        run = Run(config, team)
        facts = {
            "device": device_name(run.device),
            "processes": team.world,
            "torch": torch.__version__,
            "data": run.data_record,
        }

        def begin() -> Path:
            folder = RunFolder.create(out, config.name)
            folder.write_config(config.to_dict(), facts)
            return folder.path

        folder = RunFolder(team.lead(begin))
        with ExitStack() as stack:
            team.lead(lambda: stack.enter_context(folder.held()))
            result = run.train(folder)
        return result if team.leads else None


def resume(path: Path, overrides: dict[str, Any]) -> RunResult | None:
    """Goes on with an interrupted run to the same end, on any number of processes. Returns the result on rank 0.

    Raises:
        UserError: there is no run in `path`, one of its files is damaged, the images are no longer those that it began
            with, or what `train` raises.
    """
    with join() as team:
        folder = RunFolder(path)
        options, facts = team.lead(folder.read_config)
        config = TrainConfig.from_dict({**options, **overrides})
        run = Run(config, team)
        changed = changed_images(facts["data"], run.data_record)
        if changed:
            raise UserError(
                f"the images in {run.dataset.name} are not those that the run in {path} began with ({changed}): "
                "it goes on exactly with the same ones only"
            )
        with ExitStack() as stack:
            team.lead(lambda: stack.enter_context(folder.held()))
            team.lead(folder.remove_remains)
            result = run.train(folder)
        return result if team.leads else None


def go_on(folder: RunFolder) -> str:
    return f"`rpg-fast train --resume {folder.path}` goes on"


@contextmanager
def on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where this is the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def model_arguments(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """The arguments of `build_model` for this data; stored in the checkpoint so that the model needs no data set."""
    small = config.arch in ARCHITECTURES and dataset.image_size <= SMALL_IMAGE
    return {
        "arch": config.arch,
        "num_classes": dataset.num_classes,
        "in_channels": dataset.in_channels,
        "stem": config.stem or ("small" if small else None),
        "width": config.width,
        "zero_init_residual": config.zero_init_residual,
    }


def new_model(arguments: dict[str, Any], image_size: int) -> nn.Module:
    """The model of `model_arguments`, with random weights.

    Raises:
        UserError: it cannot be built, or does not fit the images.
    """
    try:
        model = build_model(**arguments)
        check_network(model, arguments, image_size)
    except ValueError as error:
        raise UserError(f"--arch {error}") from error
    return model


def load_pretrained(model: nn.Module, path: Path, config: TrainConfig) -> None:
    """Weights from any file that `formats.read_network` reads.

    Raises:
        UserError: the file is no good, or its network is another.
    """
    network = read_network(path, arch=config.arch)
    try:
        model.load_state_dict(network.state_dict)
    except RuntimeError as error:
        raise UserError(f"--pretrained {path} does not fit --arch {config.arch} here: {reason(error)}") from error


def load_data(config: TrainConfig, local_world: int = 1) -> Dataset:
    """The data set that the configuration names, for one of `local_world` processes on this machine."""
    if config.reads_files:
        from .folder import load_folder

        path = config.data[len(FOLDER) :]
        return load_folder(
            path,
            image_size=config.image_size,
            workers=config.workers,
            bad_images=config.bad_images,
            local_world=local_world,
        )
    if config.data == "digits":
        return load_digits(config.image_size)
    return make_synthetic(
        image_size=config.image_size,
        num_classes=config.classes,
        train_images=config.train_images,
        test_images=config.test_images,
        seed=config.seed,
    )


def choose_device(config: TrainConfig, team: Team = ALONE) -> torch.device:
    """The device to train on ("auto": CUDA where there is one); of several processes each its own GPU. It becomes the
    current one, so that nothing is made on another.

    Raises:
        UserError: there is no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is unknown; known are auto, cpu, cuda, cuda:0, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported; known are auto, cpu, cuda, cuda:0, ...")
    if device.type == "cuda" and team.world > 1:
        if ":" in name:
            raise UserError(
                f"--device {name} names one GPU for {team.world} processes: --device cuda gives each its own"
            )
        device = torch.device("cuda", team.local_rank)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {device} is not there: PyTorch {torch.__version__} sees {count} CUDA devices")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def set_determinism(config: TrainConfig) -> None:
    """With --deterministic, operations that give the same bits each time; torch raises where it has none. On the CPU
    all those used here do anyway. Without, cuDNN tries which convolutions are fastest for each shape."""
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.backends.cudnn.benchmark = not config.deterministic


def choose_threads(config: TrainConfig, dataset: Dataset) -> None:
    """Sets the number of CPU threads. On tiny images one is fastest: the others would mostly wait for each other."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif dataset.image_size <= TINY_IMAGE:
        torch.set_num_threads(1)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
