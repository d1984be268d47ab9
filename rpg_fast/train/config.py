"""Everything that defines a training run, checked before anything is built or written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .data import DATASETS, FOLDER
from .models import ARCHITECTURES, is_library

DEFAULT_LR = {"sgd": 0.1, "adamw": 2e-3}
OFFICIAL = {
    "distribution": "global_magnitude",
    "criterion": "rigl",
    "schedule": "exponential",
    "rank_every": "update",
}  # what the published rules are defined for


KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "none",
}


class UserError(Exception):
    """Something that the user can put right; its text is shown as it is, without a traceback."""


class LocalError(UserError):
    """What one process alone has found out, as in its part of the data: of several it is the one that tells."""


class Stopped(Exception):  # noqa: N818 (no error)
    """The run was asked to stop; its text says where it can go on."""


@dataclass(frozen=True)
class TrainConfig:
    """The options of `rpg-fast train` under the same names; every value can be written to JSON.

    Raises:
        UserError: a value is out of its range.
    """

    # data
    data: str = "digits"
    image_size: int | None = None
    classes: int = 10
    train_images: int = 1024
    test_images: int = 256
    workers: int | None = None
    bad_images: Literal["stop", "skip"] = "stop"
    # network
    arch: str = "resnet20"
    width: int | None = None
    stem: Literal["imagenet", "small"] | None = None
    zero_init_residual: bool = False
    # training
    epochs: int = 40
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    optimizer_impl: Literal["masked", "torch"] = "masked"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    warmup_epochs: float | None = None
    label_smoothing: float = 0.1
    clip_grad_norm: float | None = None
    mixup: float = 0.0
    ema_decay: float | None = None
    # sparsity
    sparsity: float = 0.98
    keep_dense: str | None = None
    distribution: str = "global_magnitude"
    criterion: str = "rigl"
    schedule: str = "exponential"
    update_every: int | None = None
    prune_until: float = 0.9
    update_until: float = 0.901
    drop_fraction: float = 0.3
    dense_baseline: bool = True
    start_from: Literal["random", "dense", "pretrained"] | None = None
    pretrained: str | None = None
    # rank loss
    rank_weight: float = 0.1
    rank_every: int | Literal["update"] = 1
    tail_energy: float = 0.1
    rank_method: str = "auto"
    min_sparsity: float = 0.0
    # published decisions
    semantics: Literal["corrected", "official"] = "corrected"
    grow_steps: int = 1
    # machine
    device: str = "auto"
    autocast: Literal["bf16", "fp16"] | None = None
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    threads: int | None = None
    # what is written
    checkpoint_every: int | None = None
    tensorboard: bool = False
    wandb: str | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        self._check_numbers()
        self._check_together()

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, wanted = getattr(self, name), _kinds(hint)
            taken = {*wanted, int} if float in wanted else wanted
            got = repr(value) if type(value) in KINDS else type(value).__name__
            _require(type(value) in taken, name, " or ".join(KINDS[kind] for kind in wanted), got)

    def _check_choices(self) -> None:
        if not self.reads_files:
            _one_of("--data", self.data, (*DATASETS, f"{FOLDER}PATH"))
        _one_of("--bad-images", self.bad_images, ("stop", "skip"))
        if not is_library(self.arch):
            _one_of("--arch", self.arch, (*ARCHITECTURES, "torchvision:NAME", "timm:NAME"))
        _one_of("--stem", self.stem, (None, "imagenet", "small"))
        _one_of("--optimizer", self.optimizer, DEFAULT_LR)
        _one_of("--optimizer-impl", self.optimizer_impl, ("masked", "torch"))
        _one_of("--autocast", self.autocast, (None, "bf16", "fp16"))
        _one_of("--start-from", self.start_from, (None, "random", "dense", "pretrained"))
        _one_of("--semantics", self.semantics, ("corrected", "official"))
        _require(self.wandb != "", "wandb", "the name of a project", "an empty one")

    def _check_numbers(self) -> None:
        # OpenMP ends the process where it cannot start so many.
        _require(self.threads is None or 1 <= self.threads <= 1024, "threads", "from 1 to 1024", self.threads)
        for option in ("image_size", "width", "update_every", "checkpoint_every"):
            value = getattr(self, option)
            _require(value is None or value >= 1, option, "at least 1", value)
        _require(self.workers is None or self.workers >= 0, "workers", "at least 0", self.workers)
        for option in ("classes", "train_images", "test_images", "epochs", "batch_size", "accumulate", "grow_steps"):
            _require(getattr(self, option) >= 1, option, "at least 1", getattr(self, option))
        for field in fields(self):
            value = getattr(self, field.name)
            _require(not isinstance(value, float) or math.isfinite(value), field.name, "a finite number", value)
        _require(0 <= self.seed < 2**63, "seed", "at least 0 and below 2^63", self.seed)
        for option in ("momentum", "weight_decay", "rank_weight", "mixup"):
            _require(getattr(self, option) >= 0, option, "at least 0", getattr(self, option))
        _require(
            0 <= self.warmup < self.epochs, "warmup_epochs", f"at least 0 and below --epochs {self.epochs}", self.warmup
        )
        for option in ("lr", "clip_grad_norm"):
            value = getattr(self, option)
            _require(value is None or value > 0, option, "above 0", value)
        for option in ("label_smoothing", "sparsity", "ema_decay"):
            value = getattr(self, option)
            _require(value is None or 0 <= value < 1, option, "at least 0 and below 1", value)
        _require(0 < self.tail_energy < 1, "tail_energy", "between 0 and 1", self.tail_energy)
        _require(
            self.rank_every == "update" or (isinstance(self.rank_every, int) and self.rank_every >= 1),
            "rank_every",
            '"update" or at least 1',
            self.rank_every,
        )

    def _check_together(self) -> None:
        if self.batch_size < self.accumulate:
            raise UserError(
                f"--accumulate {self.accumulate} splits a batch into that many parts, "
                f"but --batch-size is only {self.batch_size}"
            )
        for field in fields(self):
            made_up = field.name in ("classes", "train_images", "test_images")
            if made_up and self.data != "synthetic" and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name.replace('_', '-')} is for --data synthetic: {self.data} has its own")
            from_files = field.name in ("workers", "bad_images")
            if from_files and not self.reads_files and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name.replace('_', '-')} is for --data {FOLDER}PATH, not for {self.data}")
        for option in ("width", "stem", "zero_init_residual"):
            if is_library(self.arch) and getattr(self, option):
                raise UserError(f"--{option.replace('_', '-')} is for the networks of rpg-fast, not for {self.arch}")
        other = {name: getattr(self, name) for name, only in OFFICIAL.items() if getattr(self, name) != only}
        if self.semantics == "official" and other:
            raise UserError(f"--semantics official is defined for {_as_options(OFFICIAL)}, got {_as_options(other)}")
        if self.start_from == "dense" and not self.dense_baseline:
            raise UserError(
                "--start-from dense begins with the dense baseline's weights: leave out --no-dense-baseline"
            )
        if self.pretrained is not None and self.start_from not in (None, "pretrained"):
            raise UserError(
                f"--pretrained names weights to begin with, but --start-from {self.start_from} does not take them"
            )

    @property
    def reads_files(self) -> bool:
        """Whether the images come from files: `data` is "folder:" and a path."""
        return str(self.data).startswith(FOLDER) and self.data != FOLDER

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def starts_dense(self) -> bool:
        """Whether the sparse training begins with the dense baseline's weights, as published."""
        return self.dense_baseline and self.pretrained is None and self.start_from in (None, "dense")

    @property
    def warmup(self) -> float:
        """Epochs over which the learning rate rises: by default a tenth of the run, at most 5 (as published)."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def name(self) -> str:
        """A name for the run's folder."""
        data = Path(self.data).name if self.reads_files else self.data
        return f"{data}-{self.arch.replace(':', '-').replace('/', '-')}-{self.sparsity * 100:g}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            UserError: `values` has unknown names, or values of a wrong type or out of their range.
        """
        unknown = sorted(map(str, set(values) - {field.name for field in fields(cls)}))
        if unknown:
            raise UserError(f"the configuration has unknown entries: {', '.join(unknown)}")
        return cls(**values)


def _kinds(hint: Any) -> list[type]:
    """The types that a value of an option may have."""
    if get_origin(hint) in (Union, UnionType):
        return list(dict.fromkeys(kind for part in get_args(hint) for kind in _kinds(part)))
    if get_origin(hint) is Literal:
        return [str]
    return [hint]


def _as_options(values: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _one_of(option: str, value: object, known: Any) -> None:
    if value not in known:
        names = ", ".join(str(name) for name in known if name is not None)
        raise UserError(f"{option} {value!r} is unknown; known are {names}")


def _require(holds: bool, option: str, wanted: str, got: object) -> None:
    if not holds:
        raise UserError(f"--{option.replace('_', '-')} must be {wanted}, got {got}")
