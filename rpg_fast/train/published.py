"""The options of the published program (RPG, Zhang et al., NeurIPS 2023) as options of this one: other names for the
same, values that mean something else here, what changes no result, and what to do instead of the rest."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .config import UserError

ALIASES = {
    "arch": ("--model", "-a"),
    "drop_fraction": ("--alpha",),
    "grow_steps": ("--grad-accumulation-n",),
    "label_smoothing": ("--label_smoothing",),
    "lr": ("--learning-rate",),
    "min_sparsity": ("--sparsity_thres",),
    "optimizer": ("--optim",),
    "out": ("--checkpoint-dir",),
    "pretrained": ("--pretrained-weights",),
    "prune_until": ("--iterative_T_end_percent",),
    "rank_weight": ("--lamb",),
    "tail_energy": ("--partial_k",),
    "update_every": ("--delta",),
    "update_until": ("--T-end-percent", "--T_end_percent"),
    "warmup_epochs": ("--warmup",),
    "weight_decay": ("--wd",),
    "workers": ("-j",),
}
"""Ours -> those of the published program that take the same value."""

ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {"distribution": "uniform", "keep_dense": "conv1,fc"},
    "alluniform": {"distribution": "uniform"},
    "erk": {"distribution": "erk"},
    "magnitude-exponential": {"distribution": "global_magnitude", "schedule": "exponential"},
}
"""Values of --sp-distribution. Only the last one is the published recipe's; the others lack its cosine schedule."""

ONLY = {
    ("--lr-schedule", "--scheduler"): (
        "cosine2",
        "the learning rate rises over --warmup-epochs and falls by half a cosine, step by step",
    ),
    ("--static-topo",): ("0", "--criterion static --schedule constant keeps the masks of one pruning by magnitude"),
    ("--data-backend", "--data_backend"): (
        "pytorch",
        "--workers processes decode the images of --data folder:PATH; --data synthetic makes some up",
    ),
    ("--model-config", "-c"): ("classic", "the networks are torchvision's"),
}
"""Options that have one value here, and what there is instead of the others."""

FIGURES = "the figures are in metrics.csv in the run's folder, which --out names"
RATE = "the learning rate rises over --warmup-epochs to --lr and falls by half a cosine"
SHORT = "--data synthetic --train-images N makes short epochs"
CHECKPOINT = "the last checkpoint is checkpoint.pt in the run's folder, which --out names"
UNUSED = "it had no effect in the published program: leave it out"

INSTEAD: dict[str, str] = {
    "--bn-weight-decay": "norms and biases have no weight decay here: leave it out",
    "--run-epochs": "SIGTERM stops a run after any step, and --resume goes on: leave it out",
    "--evaluate": "`rpg-fast evaluate FILE` tests a network",
    "--training-only": "every epoch is tested: leave it out",
    "--no-checkpoints": CHECKPOINT,
    "--checkpoint-filename": CHECKPOINT,
    "--gather-checkpoints": CHECKPOINT,
    "--save_inter": CHECKPOINT,
    "--workspace": "--out names the run's folder",
    "--id": "--out names the run's folder",
    "--log-filename": FIGURES,
    "--raport-file": FIGURES,
    "--lr-decay-epochs": RATE,
    "--lr-file": RATE,
    "--lrconfig": RATE,
    "--static-loss-scale": "--autocast fp16 finds the scale by itself, --autocast bf16 needs none: leave it out",
    "--prof": SHORT,
    "--short-train": SHORT,
    "--restart-training": "--pretrained FILE begins with the weights of a checkpoint",
    "--do-not-reset-epochs": "--resume DIR goes on with a run, --pretrained FILE begins with a checkpoint's weights",
    "--T-end-epochs": "--update-until takes the fraction of the run",
    "--dataset": "--data folder:PATH names the images",
    "--num-classes": "the images tell their classes (--classes N is for --data synthetic): leave it out",
    "--widths": "--width N sets the channels of the first stage, the later ones double them",
    "--allconfig": UNUSED,
    "--scheme": UNUSED,
    "--init_method": UNUSED,
    "--nproc_per_node": "it is an option of torchrun: torchrun --nproc-per-node N -m rpg_fast train ...",
}
"""Options that cannot be honoured, and what to use."""
FLAGS = (
    *("--bn-weight-decay", "--evaluate", "--training-only", "--no-checkpoints", "--gather-checkpoints"),
    *("--short-train", "--restart-training", "--do-not-reset-epochs"),
)

NO_EFFECT: dict[tuple[str, ...], str] = {
    ("--distributed",): "torchrun starts several processes",
    ("--eval-batch-size", "--eval_batch_size"): "accuracy does not depend on it",
    ("--print-freq", "-p"): "figures are printed after each epoch",
    ("--dynamic-loss-scale",): "with --autocast fp16 it is always dynamic",
    ("--bounded",): "the published program does not use it either",
}
"""Options without which the result is the same, and why."""
EFFECTLESS_FLAGS = ("--distributed", "--dynamic-loss-scale", "--bounded")


class Given(argparse.Action):
    """Keeps a value, and under which name it was given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        take(namespace, {self.dest: values}, option)


def take(namespace: argparse.Namespace, options: dict[str, Any], name: str | None) -> None:
    """Sets options that the command line named `name`."""
    vars(namespace).update(options)
    vars(namespace).setdefault("named", {}).update(dict.fromkeys(options, name))


def _mapped(options: Callable[[Any], dict[str, Any]]) -> type[argparse.Action]:
    """An action that sets what `options` makes of the value."""

    class Mapped(argparse.Action):
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
            take(namespace, options(values), option)

    return Mapped


class _Only(argparse.Action):
    """Accepts one value, `const`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if values != self.const:
            parser.error(f"{option} {values}: here it is {self.const}: {self.help}")


class _Instead(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        parser.error(f"{option} is not an option here: {self.const}")


class _NoEffect(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        vars(namespace).setdefault("notes", []).append(f"{option} has no effect here: {self.const}")


def add_published(parser: argparse.ArgumentParser) -> None:
    """Adds the published options that are no aliases. A namespace then has, where they were given, `notes` to print,
    `named` {option: the name it was given by}, `per_process` and `per_step` for `batches`."""
    group = parser.add_argument_group("names of the published program, beside those above")

    def sparsity(text: str) -> dict[str, Any]:
        return {"sparsity": round(1 - float(text), 12)}

    group.add_argument(
        *("--batch_size", "-b"),
        type=int,
        dest="per_process",
        metavar="N",
        help="images per process, as published: --batch-size N times the processes",
    )
    group.add_argument(
        "--optimizer-batch-size",
        type=int,
        dest="per_step",
        metavar="N",
        help="--batch-size N, in micro-batches (--accumulate) of --batch_size images per process",
    )
    group.add_argument(
        "--dense-allocation", type=_density, action=_mapped(sparsity), metavar="D", help="--sparsity 1-D"
    )
    group.add_argument(
        "--sp-distribution",
        type=_allocation,
        action=_mapped(lambda name: ALLOCATIONS[name]),
        metavar="NAME",
        help="magnitude-exponential: --distribution global_magnitude --schedule exponential; erk; alluniform: "
        "--distribution uniform; uniform: that with --keep-dense conv1,fc",
    )
    for option in ("--amp", "--fp16"):
        half = _mapped(lambda _: {"autocast": "fp16"})
        group.add_argument(option, nargs=0, action=half, help="--autocast fp16")
    group.add_argument(
        "--memory-format",
        choices=("nchw", "nhwc"),
        action=_mapped(lambda name: {"channels_last": name == "nhwc"}),
        help="nhwc: --channels-last",
    )
    for names, (value, instead) in ONLY.items():
        group.add_argument(*names, action=_Only, const=value, metavar=value, help=instead)
    for names, reason in NO_EFFECT.items():
        group.add_argument(
            *names,
            action=_NoEffect,
            const=reason,
            nargs=0 if names[0] in EFFECTLESS_FLAGS else None,
            metavar="N",
            help=f"no effect: {reason}",
        )
    for name, instead in INSTEAD.items():
        nargs = 0 if name in FLAGS else "?"
        group.add_argument(name, action=_Instead, nargs=nargs, const=instead, help=argparse.SUPPRESS)


def batches(given: dict[str, Any], processes: int) -> None:
    """Puts --batch_size and --optimizer-batch-size, which count by process, in the terms of --batch-size and
    --accumulate.

    Raises:
        UserError: two of them contradict each other.
    """
    named: dict[str, Any] = given.setdefault("named", {})
    mine, whole = given.pop("per_process", None), given.pop("per_step", -1)
    if mine is not None and "batch_size" in given:
        raise UserError(f"{named['per_process']} is --batch-size times the processes: give one of them")
    if mine is not None:
        _at_least_one(named["per_process"], mine)
        given["batch_size"], named["batch_size"] = mine * processes, f"{named['per_process']} {mine} x {processes}"
    if whole < 0:
        return
    _at_least_one("--optimizer-batch-size", whole)
    if mine is None or "accumulate" in given:
        raise UserError(
            "--optimizer-batch-size goes with --batch_size, images per process and micro-batch: "
            "in our terms it is --batch-size, with --accumulate micro-batches"
        )
    if whole % (mine * processes):
        raise UserError(
            f"--optimizer-batch-size {whole} is no multiple of {mine} images for each of {processes} processes"
        )
    given["batch_size"], given["accumulate"] = whole, whole // (mine * processes)
    named["batch_size"] = named["accumulate"] = f"--optimizer-batch-size {whole}"


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{option} must be at least 1, got {value}")


def _density(text: str) -> str:
    try:
        float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error
    return text


def _allocation(text: str) -> str:
    if text not in ALLOCATIONS:
        warm = ", whose schedule has no warm-up here" if text.startswith("magnitude-exponential-warm") else ""
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(ALLOCATIONS)}{warm})")
    return text
