"""The commands `rpg-fast train`, `rpg-fast evaluate` and `rpg-fast export`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from rpg_fast._output import tell
from rpg_fast.criteria import CRITERIA
from rpg_fast.distributions import DISTRIBUTIONS
from rpg_fast.rank_loss import Method
from rpg_fast.schedules import SCHEDULES

from .config import DEFAULT_LR, LocalError, Stopped, TrainConfig, UserError
from .data import DATASETS, FOLDER, explain_lost_worker
from .distributed import LostProcess, end_process, launched, prints_errors
from .evaluate import add_evaluate
from .export import add_export
from .models import ARCHITECTURES, is_library
from .pickles import first_line
from .published import ALIASES, ALLOCATIONS, Given, add_published, batches, take
from .recipes import RECIPES, describe, from_recipe

DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one of them. Returns 0, or 2 with one line on stderr where the input is no good (1: a process was lost)."""
    return end_process(_main(argv))


def _main(argv: list[str] | None) -> int:
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    try:
        status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except Stopped as stopped:
        if prints_errors():
            print(f"rpg-fast {arguments.name}: {stopped}", file=sys.stderr)
        return 0
    except LostProcess as lost:
        if str(lost):
            print(f"rpg-fast {arguments.name}: error: {lost}", file=sys.stderr)
        return 1
    except UserError as error:
        if prints_errors() or isinstance(error, LocalError):
            print(f"rpg-fast {arguments.name}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        told = explain_lost_worker(error) or explain_memory(error)
        if told is None:
            raise
        print(f"rpg-fast {arguments.name}: error: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if prints_errors():
            again = "`rpg-fast train --resume DIR` goes on with a run"
            print(f"rpg-fast {arguments.name}: interrupted; {again}", file=sys.stderr)
        return 130


def explain_memory(error: RuntimeError) -> str | None:
    """What to do where a device or the machine had no more memory; None for other errors."""
    text = first_line(error)
    wanted = re.search(r"ried to allocate ([\d.]+ \w+)", text)
    if wanted is None:
        return None
    return f"out of memory, {wanted[1]} more were wanted: a smaller --batch-size, or parts of it (--accumulate N)"


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rpg-fast", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train a sparse network, and a dense one to compare it with",
        description="Trains a dense baseline and a sparse network of the same architecture. Without options: ResNet-20 "
        "on scikit-learn's handwritten digits, 98 % sparse.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    train.set_defaults(command=_train, name="train")
    train.register("action", None, Given)
    train.add_argument("--recipe", choices=tuple(RECIPES), help="published hyper-parameters, for all options not given")
    train.add_argument(
        "--show-config", action="store_true", help="print every value and where it is from; train nothing"
    )
    for add_group in (
        *(_data_options, _network_options, _training_options, _sparsity_options, _rank_options, _fidelity_options),
        *(_machine_options, _output_options),
    ):
        add_group(train)
    add_published(train)
    folder = train.add_argument_group("folder").add_mutually_exclusive_group()
    folder.add_argument(
        "--out",
        *ALIASES["out"],
        type=Path,
        metavar="DIR",
        help="where the run is written; must not exist (default: runs/<data>-<arch>-<sparsity>, numbered where taken)",
    )
    folder.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="go on with the interrupted run in DIR, with its own options (only --device and --threads may be new)",
    )

    add_evaluate(commands)
    add_export(commands)
    return parser


class _Group:
    """Options whose names and defaults are those of `TrainConfig`."""

    def __init__(self, parser: argparse.ArgumentParser, title: str):
        self.group = parser.add_argument_group(title)

    def add(self, option: str, text: str, **kwargs: Any) -> None:
        """One option; the help shows its default unless that is None, which the text then explains."""
        name = option.lstrip("-").replace("-", "_")
        default = DEFAULTS[name]
        shown = "" if default is None else f" (default: {default})"
        self.group.add_argument(option, *ALIASES.get(name, ()), help=(text + shown).strip(), **kwargs)

    def flag(self, option: str, text: str) -> None:
        default = DEFAULTS[option.lstrip("-").replace("-", "_")]
        action = argparse.BooleanOptionalAction if default else "store_true"
        self.group.add_argument(option, help=text, action=action)


def _data_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "data")
    group.add(
        "--data",
        "digits: 1,797 handwritten digits; synthetic: made up, of any size; folder:PATH: the image files "
        "PATH/train/CLASS/IMAGE and PATH/val/CLASS/IMAGE (or PATH/test/...)",
        type=_data_set,
        metavar="DATA",
    )
    group.add("--image-size", "side of the images (digits 8, synthetic 32, folder 224)", type=int, metavar="PIXELS")
    group.add("--classes", "classes of the synthetic data", type=int, metavar="N")
    group.add("--train-images", "training images of the synthetic data", type=int, metavar="N")
    group.add("--test-images", "test images of the synthetic data", type=int, metavar="N")
    group.add(
        "--workers",
        "processes that decode image files, for each that trains (its share of the cores less one, at most 16)",
        type=int,
        metavar="N",
    )
    group.add(
        "--bad-images",
        "what to do with an image file that cannot be read: stop; or skip it, and say so",
        choices=("stop", "skip"),
    )


def _data_set(text: str) -> str:
    """The name of a data set; a folder by its absolute path, so that a run can be resumed from anywhere."""
    if text.startswith(FOLDER) and text != FOLDER:
        return FOLDER + os.path.abspath(text[len(FOLDER) :])
    if text not in DATASETS:
        meant = f": for the image files in it, {FOLDER}{text}" if os.path.isdir(text) else ""
        known = f"{', '.join(DATASETS)}, {FOLDER}PATH"
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known}){meant}")
    return text


def _network_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "network")
    group.add(
        "--arch",
        f"{', '.join(ARCHITECTURES)}; torchvision:NAME or timm:NAME where the package is installed",
        type=_architecture,
        metavar="NAME",
    )
    group.add(
        "--width", "channels of the first stage (16 for resnet20/32/56, 64 for the others)", type=int, metavar="N"
    )
    group.add(
        "--stem",
        "first layer: 7x7 with stride 2 and max-pooling, or 3x3 (small for images up to 64 pixels and resnet20/32/56)",
        choices=("imagenet", "small"),
    )
    group.flag("--zero-init-residual", "start the last norm of each block at 0")


def _architecture(text: str) -> str:
    if text not in ARCHITECTURES and not is_library(text):
        known = ", ".join(ARCHITECTURES)
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known}, torchvision:NAME, timm:NAME)")
    return text


def _training_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "training")
    rates = ", ".join(f"{name} {lr}" for name, lr in DEFAULT_LR.items())
    group.add("--epochs", "passes over the training images", type=int, metavar="N")
    group.add("--batch-size", "images per optimizer step, of all processes together", type=int, metavar="N")
    group.add("--accumulate", "split each batch into N micro-batches and add up their gradients", type=int, metavar="N")
    group.add("--optimizer", "", choices=tuple(DEFAULT_LR))
    group.add(
        "--optimizer-impl",
        "masked: rpg_fast's, which mask gradient, state and weight in one pass; torch: torch.optim's",
        choices=("masked", "torch"),
    )
    group.add("--lr", f"learning rate after the warm-up ({rates}); then half a cosine, step by step", type=float)
    group.add("--warmup-epochs", "linear warm-up (a tenth of the epochs, at most 5)", type=float, metavar="N")
    group.add("--momentum", "of SGD", type=float)
    group.flag("--nesterov", "Nesterov momentum in SGD")
    group.add("--weight-decay", "of convolutions and linear weights; norms and biases have none", type=float)
    group.add("--label-smoothing", "", type=float)
    group.add("--clip-grad-norm", "clip the norm of the (masked) gradient (off)", type=float, metavar="NORM")
    group.add("--mixup", "mix images by a share from Beta(ALPHA, ALPHA); 0: off", type=float, metavar="ALPHA")
    group.add(
        "--ema-decay", "test and keep an exponential moving average of the weights (off)", type=float, metavar="DECAY"
    )


def _sparsity_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "sparsity")
    group.add("--sparsity", "fraction of zeros in all convolutions and linear layers at the end", type=float)
    group.add("--keep-dense", "layers that are not pruned, by name with commas between, as conv1,fc", metavar="NAMES")
    group.add(
        "--distribution",
        "how it is shared among the layers; magnitude-exponential is the published name of global_magnitude with "
        "--schedule exponential",
        choices=(*DISTRIBUTIONS, "magnitude-exponential"),
        action=_Distribution,
    )
    group.add(
        "--criterion",
        "what grows: rigl largest gradients, momentum their average, set random; gmp, static nothing",
        choices=CRITERIA,
    )
    group.add("--schedule", "how sparsity rises", choices=tuple(SCHEDULES))
    group.add(
        "--update-every",
        "steps between updates of the masks (100; a 50th of a short run, at least 5)",
        type=int,
        metavar="N",
    )
    group.add("--prune-until", "fraction of the run after which the final sparsity holds", type=float)
    group.add("--update-until", "fraction of the run after which the masks stay", type=float)
    group.add("--drop-fraction", "of each layer's weights exchanged in the first update", type=float)
    group.flag("--dense-baseline", "train the same network dense first")
    group.add(
        "--start-from",
        "weights that the sparse training begins with (--pretrained, or the dense baseline's, if it is trained)",
        choices=("random", "dense", "pretrained"),
    )
    group.add(
        "--pretrained",
        "weights that all training begins with: a state_dict of torchvision or timm, a checkpoint or an export",
        metavar="FILE",
    )


def _rank_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "rank loss")
    group.add("--rank-weight", "weight of the rank loss; 0 turns it off", type=float)
    group.add("--rank-every", "steps between its gradients, or update: on updates of the masks", type=_rank_every)
    group.add("--tail-energy", "the share of the spectrum's energy beyond rank k", type=float, metavar="FRACTION")
    group.add("--rank-method", "how it is computed", choices=get_args(Method))
    group.add("--min-sparsity", "only layers at least this sparse take part", type=float)


def _fidelity_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "published decisions")
    group.add(
        "--semantics",
        "official: masks as the published program makes them, with its faults; corrected: without them",
        choices=("corrected", "official"),
    )
    group.add("--grow-steps", "steps before an update whose gradients decide what grows", type=int, metavar="N")


def _machine_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "machine")
    group.add("--device", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    group.add("--autocast", "mixed precision (off)", choices=("bf16", "fp16"))
    group.flag("--channels-last", "channels_last memory format")
    group.flag("--compile", "torch.compile of the network")
    group.flag("--deterministic", "the same bits in every run also on a GPU, which costs speed")
    group.add("--seed", "of weights, data order and masks", type=int)
    group.add(
        "--threads",
        "CPU threads (PyTorch's choice; 1 for images up to 16 pixels, where that is fastest)",
        type=int,
        metavar="N",
    )


def _output_options(parser: argparse.ArgumentParser) -> None:
    group = _Group(parser, "output")
    group.add(
        "--checkpoint-every",
        "write a checkpoint every N steps too, not only after each epoch (off)",
        type=int,
        metavar="N",
    )
    group.flag("--tensorboard", "write the figures for TensorBoard into the run's folder")
    group.add("--wandb", "send the figures to a project of Weights & Biases (off)", metavar="PROJECT")


class _Distribution(argparse.Action):
    """A distribution, or a published name of one together with its schedule."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        chosen = {"distribution": values} if values in DISTRIBUTIONS else ALLOCATIONS[values]
        take(namespace, chosen, option)


def _rank_every(text: str) -> int | str:
    return text if text == "update" else int(text)


def _train(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    batches(given, int(os.environ["WORLD_SIZE"]) if launched() else 1)
    options = {name: value for name, value in given.items() if name in DEFAULTS}

    from .result import summary
    from .run import resume, train

    for note in given.get("notes", ()) if prints_errors() else ():
        print(f"note: {note}", file=sys.stderr)
    if "show_config" in given:
        print(describe(from_recipe(options), options, given["named"]))
        return 0
    if "resume" in given:
        result = resume(_run_folder(given["resume"], options), options)
    else:
        result = train(from_recipe(options), given.get("out"))
    if result is not None:
        tell(summary(result))
        if result.problem:
            raise UserError(result.problem)
    return 0


def _run_folder(path: Path, options: dict[str, Any]) -> Path:
    """The folder of a run to resume, which keeps its own `options`."""
    fixed = sorted(set(options) - {"device", "threads"})
    if fixed:
        raise UserError(f"--resume keeps the run's own options: leave out --{fixed[0].replace('_', '-')}")
    if path.is_file():
        raise UserError(
            f"--resume takes the folder of a run, but {path} is a file: --pretrained {path} begins with its weights"
        )
    return path
