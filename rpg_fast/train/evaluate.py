"""`rpg-fast evaluate`: what a network from a file is worth: accuracy, sparsity, ranks, multiply-adds, parameters."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import TrainConfig, UserError
from .data import Dataset
from .export import add_source, read_source, which_weights
from .formats import SavedNetwork
from .layers import NetworkStatistics, layer_table, network_statistics
from .result import BAD_IMAGES_SHOWN
from .sparse_cost import NetworkCost, network_cost

NO_DATA = "none"
OF_DATA = ("classes", "train_images", "test_images", "workers", "bad_images")  # options of some data sets alone
OF_MACHINE = ("device", "threads", "workers")
OPTIONS = tuple(field.name for field in fields(TrainConfig))


@dataclass(frozen=True)
class Evaluation:
    """The figures of one file. `accuracy` is a fraction, None where no data was named; `statistics` has the zeros of
    the masks, which differ from those of the weights where a weight that is kept is 0. `images` are those that the
    accuracy is of; `bad_images` {file: reason} could not be read; `size_is_told`: their size is no guess."""

    network: SavedNetwork
    data: str | None
    images: int
    accuracy: float | None
    tail_energy: float
    statistics: NetworkStatistics
    cost: NetworkCost
    bad_images: Mapping[str, str]
    size_is_told: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None for what is not finite."""
        statistics, cost = self.statistics, self.cost
        return {
            "file": str(self.network.path),
            "kind": self.network.kind,
            "model": self.network.arguments,
            "averaged": self.network.averaged,
            "data": self.data,
            "images": self.images,
            "accuracy": None if self.accuracy is None else _finite(self.accuracy),
            "bad_images": dict(self.bad_images),
            "sparsity": statistics.sparsity,
            "weights": statistics.size,
            "pruned": statistics.zeros,
            "tail_energy": self.tail_energy,
            "mean_rank_ratio": _finite(statistics.mean_rank_ratio),
            "effective_rank": _finite(statistics.effective_rank),
            "dead_filters": statistics.dead_filters,
            "image_size": cost.image_size,
            "multiply_adds": cost.multiply_adds,
            "sparse_multiply_adds": cost.sparse_multiply_adds,
            "uncounted": list(cost.uncounted),
            "parameters": cost.parameters,
            "sparse_parameters": cost.sparse_parameters,
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "sparsity": layer.sparsity,
                    "pruned": layer.zeros,
                    "rank": _finite(layer.rank),
                    "largest_rank": layer.m,
                    "effective_rank": _finite(layer.effective_rank),
                    "dead_filters": layer.dead_filters,
                    "multiply_adds": spent.multiply_adds,
                    "sparse_multiply_adds": spent.sparse_multiply_adds,
                }
                for layer, spent in zip(statistics.layers, cost.layers, strict=True)
            ],
        }

    def _of_images(self) -> str:
        """The size of the images, and whether it is a guess."""
        told = "" if self.size_is_told else ", which is a guess: the file does not tell (--image-size)"
        return f" with images of {self.cost.image_size} pixels{told}"

    def render(self) -> str:
        """The same as text."""
        network, statistics, cost = self.network, self.statistics, self.cost
        on = f" on {self.data}" if self.data else ""
        measured = "not measured: no --data" if self.accuracy is None else f"{self.accuracy:.2%}{self._of_images()}"
        lines = [
            f"{network.arguments['arch']}{on}, {network.kind}{which_weights(network)}, "
            f"k at tail energy {self.tail_energy:g}",
            "",
            layer_table(statistics),
            "",
            f"accuracy   {measured}",
            f"sparsity   {statistics.sparsity:.4%}: {statistics.zeros:,} of {statistics.size:,} weights are pruned",
            f"FLOPs      {cost.sparse_multiply_adds:,} of {cost.multiply_adds:,} multiply-adds for an image of "
            f"{cost.image_size} pixels, were every pruned weight skipped",
            f"size       {cost.sparse_parameters:,} of {cost.parameters:,} parameters",
        ]
        for name, reason in list(self.bad_images.items())[:BAD_IMAGES_SHOWN]:
            lines.append(f"not in the accuracy: {name}: {reason}")
        if len(self.bad_images) > BAD_IMAGES_SHOWN:
            lines.append(f"not in the accuracy: {len(self.bad_images) - BAD_IMAGES_SHOWN:,} more that --json lists")
        if cost.uncounted:
            lines.append(f"not in the FLOPs: {', '.join(cost.uncounted)}, whose layers the forward pass does not call")
        return "\n".join(lines)


def evaluate(network: SavedNetwork, overrides: dict[str, Any]) -> Evaluation:
    """Evaluates a network from a file.

    Args:
        overrides: options of `TrainConfig` that replace those of the file; ``data="none"`` measures no accuracy, which
            is also so where neither names any data.

    Raises:
        UserError: an option is no good, here or in the file, or the model does not fit the data.
    """
    from .loop import accuracy, evaluation_batches, place
    from .run import choose_device, choose_threads, load_data

    data = overrides.get("data", network.config.get("data", NO_DATA))
    config = _configuration(network, overrides)
    device = choose_device(config)
    model = place(network.model, device, config)
    bad_images: Mapping[str, str] = {}
    measured, images, image_size = None, 0, config.image_size or _usual_size(network)
    if data != NO_DATA:
        dataset = load_data(config).to(device)
        _check_fit(network, dataset)
        choose_threads(config, dataset)
        batches = evaluation_batches(dataset, config)
        measured = accuracy(model, batches, config)
        bad_images, image_size = batches.bad_images, dataset.image_size
        images = len(dataset.test) - len(bad_images)
    return Evaluation(
        network,
        None if data == NO_DATA else data,
        images,
        measured,
        config.tail_energy,
        _with_masks(network_statistics(model, config.tail_energy), network),
        _cost(network, image_size),
        bad_images,
        not config.reads_files or "image_size" in {**network.config, **overrides},
    )


def _configuration(network: SavedNetwork, overrides: dict[str, Any]) -> TrainConfig:
    """That of the training, as far as it is about the network and the data that are evaluated."""
    trained_on = network.config.get("data", TrainConfig.data)
    data = overrides.get("data", trained_on)
    leave = {*OF_MACHINE, *(OF_DATA if data != trained_on else ())}
    kept = {name: value for name, value in network.config.items() if name not in leave}
    try:
        kept = TrainConfig.from_dict({"arch": network.arguments["arch"], **kept}).to_dict()
    except UserError as error:
        raise UserError(f"{network.path}: {error}") from error
    return TrainConfig.from_dict({**kept, **overrides, "data": trained_on if data == NO_DATA else data})


def _check_fit(network: SavedNetwork, dataset: Dataset) -> None:
    for what, have, key in (
        ("channels", dataset.in_channels, "in_channels"),
        ("classes", dataset.num_classes, "num_classes"),
    ):
        want = network.arguments[key]
        if have != want:
            raise UserError(f"{network.path} is a model for {want} {what}, but {dataset.name} has {have}")


def _usual_size(network: SavedNetwork) -> int:
    """Pixels of the images that a network is made for: CIFAR's with the small stem, ImageNet's otherwise."""
    return 32 if network.arguments.get("stem") == "small" else 224


def _cost(network: SavedNetwork, image_size: int) -> NetworkCost:
    channels = network.arguments["in_channels"]
    try:
        return network_cost(network.model, network.masks, in_channels=channels, image_size=image_size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{network.path}: its model takes no images of {image_size} pixels: {reason}") from error


def _with_masks(statistics: NetworkStatistics, network: SavedNetwork) -> NetworkStatistics:
    """The statistics with the zeros of the masks in place of the weights'."""
    layers = (replace(layer, zeros=int((~network.masks[layer.name]).sum())) for layer in statistics.layers)
    return NetworkStatistics(tuple(layers))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -------------------------------------------------------------------------------------------------------------- command


def add_evaluate(commands: Any) -> None:
    """Adds `evaluate` to the subparsers of `rpg-fast`."""
    parser = commands.add_parser(
        "evaluate",
        help="accuracy, sparsity, ranks, multiply-adds and parameters of a network in a file",
        description="Reads checkpoints and exports of rpg-fast, checkpoints of the published RPG code, and state_dicts "
        "of torchvision, timm and others (torch.save or safetensors). Prints accuracy, sparsity and ranks by layer, "
        "sparse multiply-adds and parameters. Data and precision are those of the training unless options say "
        "otherwise; a file that does not tell them needs --data for its accuracy.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(command=_run, name="evaluate")
    add_source(parser)
    parser.add_argument("--data", help="the data set, or none: no accuracy (default: that of the training)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="another side of the images")
    parser.add_argument("--batch-size", type=int, metavar="N", help="a quarter of the images of one forward pass")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode the images of a folder")
    parser.add_argument("--bad-images", choices=("stop", "skip"), help="what to do with an image that cannot be read")
    parser.add_argument("--tail-energy", type=float, metavar="FRACTION", help="another tail energy for the ranks")
    parser.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", default=False, help="one JSON object in place of the text")


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    overrides = {name: value for name, value in given.items() if name in OPTIONS and name != "arch"}
    result = evaluate(read_source(arguments), overrides)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result.render())
    return 0
