"""The training loop: how rpg_fast is used, step by step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rpg_fast import RankPruner
from rpg_fast._output import tell

from .checkpoint import random_states, restore_random_states, seed_everything, to_device
from .config import TrainConfig, UserError
from .data import Batches, Dataset
from .distributed import ALONE, Team
from .layers import network_statistics
from .optimization import Average, MixUp, learning_rate, make_optimizer, make_pruner, update_interval
from .throughput import bound

UPDATES_PER_CHECK = 10  # between comparisons of the ranks
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.csv. Accuracies and sparsity are fractions, `lr` and `rank_loss` the last ones (NaN: none),
    ranks means over the convolutions. `sparsity` is the masks', where weights just grown count although they are 0,
    `waiting` the share of the time in which rank 0 had nothing to do but wait for images."""

    run: str
    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    sparsity: float
    rank_loss: float
    mean_rank_ratio: float
    effective_rank: float
    dead_filters: int
    images_per_second: float
    waiting: float


class Trainer:
    """One model in training: its data, its optimizer and, where it is to become sparse, its pruner.

    Args:
        model: on its device and in its memory format already; the same on all ranks of `team`.
        dataset: on the same device.
        name: of the run in the metrics: "dense" or "sparse".
        sparse: attach a `rpg_fast.RankPruner`.
        team: the processes that share each batch.

    Attributes:
        epoch, position: whole epochs, and batches of the next one, that are done. step: optimizer steps in all.
        evaluated: the model that is tested and kept: the average, if there is one, else the model itself.

    Raises:
        UserError: the data, the optimizer or the pruner does not accept the configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: TrainConfig,
        *,
        name: str,
        sparse: bool,
        team: Team = ALONE,
    ):
        self.model, self.config, self.name, self.team = model, config, name, team
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.image_shape = (dataset.in_channels, dataset.image_size, dataset.image_size)
        self.order = torch.Generator().manual_seed(config.seed)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.mixup = MixUp(config.mixup, config.seed)
        if config.batch_size < team.world * config.accumulate:
            raise UserError(
                f"--batch-size {config.batch_size} cannot be shared among {team.world} processes with --accumulate "
                f"{config.accumulate}: each of them needs an image for each part"
            )
        try:
            self.train_batches = training_batches(dataset, config, self.order, team)
            self.total_steps = len(self.train_batches) * config.epochs
            self.optimizer = make_optimizer(model, config)
            self.pruner = make_pruner(model, self.optimizer, self.total_steps, config) if sparse else None
        except ValueError as error:
            raise UserError(str(error)) from error
        self.test_batches = evaluation_batches(dataset, config, team)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.autocast == "fp16")
        self.average = None if config.ema_decay is None else Average(model, config.ema_decay)
        self.evaluated = model if self.average is None else self.average.model
        self.network = self._network()
        self.epoch = self.position = self.step = 0
        self._epoch_start = self.order.get_state()
        self._totals = self._no_totals()

    def _network(self) -> nn.Module:
        """What forward and backward run through: the model, reduced over the team and compiled where asked for."""
        network = self.model
        if self.team.world > 1:
            network = DistributedDataParallel(
                network, device_ids=[self.device] if self.device.index is not None else None
            )
        if self.config.compile:
            network.compile()
        return network

    def _order_buckets(self) -> None:
        """A pass over black images that leaves no trace but the order of DistributedDataParallel's buckets. They take
        that of the first gradients, and it decides how three and more ranks round a sum: a resumed run shall do so as
        one that was never interrupted."""
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        states = random_states(self.device)
        mine = torch.arange(self.config.batch_size).tensor_split(self.team.world)[self.team.rank]
        size = len(mine.tensor_split(self.config.accumulate)[0])
        images = torch.zeros(size, *self.image_shape, device=self.device, dtype=self.dtype)
        labels = torch.zeros(size, device=self.device, dtype=torch.int64)
        self.model.train()
        with autocast(self.device, self.config):
            logits = self.network(images.contiguous(memory_format=memory_format(self.config)))
            loss = self.criterion(logits, labels)
        loss.backward()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        restore_random_states(states, self.device)

    def _no_totals(self) -> tuple[Tensor, Tensor]:
        """Loss and hits of this epoch on this rank, summed on the device."""
        return torch.zeros((), device=self.device), torch.zeros((), device=self.device, dtype=torch.int64)

    def run(self, on_epoch: Callable[[EpochMetrics], None], on_step: Callable[[], None] = lambda: None) -> None:
        """Trains to the last epoch; `on_epoch` gets the figures after each, `on_step` is called after each step.

        Raises:
            UserError: the weights are no longer finite, or not the same on all ranks.
        """
        if isinstance(self.network, DistributedDataParallel) and self.epoch < self.config.epochs:
            self._order_buckets()
        terminal = sys.stderr.isatty() and self.team.leads
        with tqdm(total=self.total_steps, initial=self.step, desc=self.name, unit="step", disable=not terminal) as bar:
            while self.epoch < self.config.epochs:
                metrics = self.train_epoch(bar, on_step)
                on_epoch(metrics)
                fields = progress_fields(metrics)
                if terminal:
                    bar.set_postfix(fields)
                elif self.team.leads:
                    figures = "  ".join(f"{name} {value}" for name, value in fields.items())
                    tell(f"{self.name}  epoch {metrics.epoch:>3}/{self.config.epochs}  {figures}")
                if not math.isfinite(metrics.mean_rank_ratio):
                    raise UserError(
                        f"the {self.name} training diverged, its weights are not finite after epoch {self.epoch}: "
                        "a smaller --lr or a longer --warmup-epochs may help"
                    )
        self.train_batches.close()

    def train_epoch(self, bar: tqdm, on_step: Callable[[], None] = lambda: None) -> EpochMetrics:
        """One pass over the training images, then one over the test images, from where the last one was left."""
        self.model.train()
        start, first = time.perf_counter(), self.position
        for images, labels in self.train_batches.iterate(first):
            for total, value in zip(self._totals, self.train_step(images, labels), strict=True):
                total += value
            self.position += 1
            bar.update()
            if self.step % self.check_every == 0:
                self.check_agreement()
            on_step()
        loss_sum, hits = (self.team.sum(total).item() for total in self._totals)  # waits for the device
        seen = len(self.train_batches) * self.config.batch_size
        here = seen * (1 - first / len(self.train_batches))
        speed = here / (time.perf_counter() - start)
        metrics = self._metrics(loss_sum / seen, hits / seen, speed)
        self.position, self._totals, self._epoch_start = 0, self._no_totals(), self.order.get_state()
        return metrics

    def _metrics(self, train_loss: float, train_accuracy: float, speed: float) -> EpochMetrics:
        self.epoch += 1
        if self.pruner is not None:
            self._settle(self.pruner)
        self.check_agreement()
        self.team.copy_buffers(self.evaluated)
        statistics = network_statistics(self.evaluated, self.config.tail_energy)
        rank_loss = None if self.pruner is None else self.pruner.last_rank_loss
        return EpochMetrics(
            run=self.name,
            epoch=self.epoch,
            step=self.step,
            lr=self.optimizer.param_groups[0]["lr"],
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_accuracy=accuracy(self.evaluated, self.test_batches, self.config, self.team),
            sparsity=0.0 if self.pruner is None else pruned_count(self.pruner) / statistics.size,
            rank_loss=math.nan if rank_loss is None else float(rank_loss),
            mean_rank_ratio=statistics.mean_rank_ratio,
            effective_rank=statistics.effective_rank,
            dead_filters=statistics.dead_filters,
            images_per_second=speed,
            waiting=self.train_batches.throughput().waiting_fraction,
        )

    def _settle(self, pruner: RankPruner) -> None:
        """After each epoch; after the last one the exact sparsity, also if the last update met infinite gradients."""
        if self.epoch < self.config.epochs:
            pruner.settle()
            return
        pruner.finalize()
        if self.average is not None:
            self.average.mask(pruner.masks.unpack())

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on this rank's images [B, C, H, W] and labels [B]. Returns summed loss and hits, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config)
        loss_sum, hits = self._no_totals()
        parts, share = self.config.accumulate, self.mixup.share(self.step)
        whole = len(labels) if self.team.world == 1 else self.config.batch_size / self.team.world
        for part, (x, y) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True), 1):
            with self._unreduced(part < parts), autocast(self.device, self.config):
                logits = self.network(self.mixup.images(x.to(self.dtype), share))  # [b, classes]
                loss = self.mixup.loss(self.criterion, logits, y, share)
            with self._unreduced(part < parts):
                self.scaler.scale(loss * (len(y) / whole)).backward()
            loss_sum += loss.detach() * len(y)
            hits += (logits.detach().argmax(1) == y).sum()

        self.scaler.unscale_(self.optimizer)
        updates = self.pruner is not None and self.pruner.updates_next
        # The pruner adds the rank gradient when it is due. On most steps that move the masks the optimizer has to rest.
        if self.pruner is None or self.pruner.step():
            self._clip_gradients()
            self.scaler.step(self.optimizer)
        if self.average is not None:
            if self.pruner is not None and updates:
                self.average.mask(self.pruner.masks.unpack())
            self.average.update()
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return loss_sum, hits

    def _unreduced(self, here: bool) -> AbstractContextManager[None]:
        """Keeps gradients on their rank until the last part of a batch."""
        if here and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    def _clip_gradients(self) -> None:
        limit = self.config.clip_grad_norm
        if limit is not None and self.pruner is None:
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        elif limit is not None and self.pruner is not None:
            self.pruner.clip_grad_norm_(limit)

    def bad_images(self) -> dict[str, str]:
        """The files that this process could not read and has skipped so far, with the reasons."""
        return {**self.train_batches.bad_images, **self.test_batches.bad_images}

    @property
    def check_every(self) -> int:
        """Steps between comparisons of the ranks."""
        return UPDATES_PER_CHECK * update_interval(self.total_steps, self.config)

    def check_agreement(self) -> None:
        """Compares parameters, masks, and what the rank loss keeps.

        Raises:
            UserError: on every rank, if a rank differs. It names the rank and the layer.
        """
        tensors: dict[str, Tensor] = {f"the weights of {name}": p for name, p in self.model.named_parameters()}
        if self.pruner is not None:
            masks, state = self.pruner.masks, self.pruner.rank_state
            ends = [*masks.layout.offsets[1:], masks.layout.nbytes]
            for name, start, end in zip(masks.names, masks.layout.offsets, ends, strict=True):
                tensors[f"the mask of {name}"] = masks.bits[start:end]
            if state.windows is not None:
                tensors["the windows of the rank loss"] = state.windows
        self.team.check_agreement(tensors, f"step {self.step}")

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, but the weights of `evaluated`. Every rank has to call it."""
        mine = {"random": random_states(self.device), "totals": [total.cpu() for total in self._totals]}
        return {
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "order": self._epoch_start,
            "ranks": self.team.gather(mine),
            "model": None if self.average is None else self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; `evaluated` is to be loaded before."""
        if state["model"] is not None:
            self.model.load_state_dict(state["model"])
        self.epoch, self.position, self.step = state["epoch"], state["position"], state["step"]
        self._epoch_start = state["order"]
        self.order.set_state(state["order"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.pruner is not None:
            rank_state = to_device(state["pruner"]["rank_state"], self.device)
            self.pruner.load_state_dict({**state["pruner"], "rank_state": rank_state})
        self._load_ranks(state["ranks"])

    def _load_ranks(self, ranks: list[dict[str, Any]]) -> None:
        """Each rank its own again; in a team of another size rank 0 takes over the sums, and randomness starts anew."""
        totals = [entry["totals"] for entry in ranks]
        if len(ranks) == self.team.world:
            self._totals = tuple(total.to(self.device) for total in totals[self.team.rank])
            restore_random_states(ranks[self.team.rank]["random"], self.device)
            return
        if self.team.leads:
            self._totals = tuple(sum(column).to(self.device) for column in zip(*totals, strict=True))
        self.seed_random()

    def seed_random(self) -> None:
        """Seeds the global generators, on every rank and at every step differently."""
        seed_everything(self.config.seed + 1_000_003 * self.team.rank + 7_919 * self.step)


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """The precision of forward passes: fp32, or mixed with bf16 or fp16."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(config.autocast or ""), enabled=config.autocast is not None)


def place(model: nn.Module, device: torch.device, config: TrainConfig) -> nn.Module:
    """The model on its device, its weights in the memory format of the images."""
    return model.to(device=device, memory_format=memory_format(config))  # type: ignore[call-overload]


def memory_format(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def pruned_count(pruner: RankPruner) -> int:
    """How many weights the masks exclude. Waits for the device."""
    return sum(pruner.masks.layout.numels) - int(pruner.masks.count().sum())


def training_batches(dataset: Dataset, config: TrainConfig, order: torch.Generator, team: Team = ALONE) -> Batches:
    """This rank's part of the training images, in an order that `order` draws alike on all ranks."""
    return Batches(
        dataset,
        dataset.train,
        config.batch_size,
        generator=order,
        memory_format=memory_format(config),
        rank=team.rank,
        world=team.world,
    )


def evaluation_batches(dataset: Dataset, config: TrainConfig, team: Team = ALONE) -> Batches:
    """This rank's part of the test images. No gradients are kept, so that a batch may be larger than in training."""
    size = 4 * config.batch_size
    return Batches(dataset, dataset.test, size, memory_format=memory_format(config), rank=team.rank, world=team.world)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, config: TrainConfig, team: Team = ALONE) -> float:
    """The fraction of images whose class gets the largest logit, of all that could be read, on all ranks; NaN if there
    were none. Leaves the model in evaluation mode."""
    model.eval()
    parameter = next(model.parameters())
    hits = torch.zeros(2, device=parameter.device, dtype=torch.int64)  # and images
    for images, labels in batches:
        if len(labels) > 0:
            with autocast(parameter.device, config):
                hits[0] += (model(images.to(parameter.dtype)).argmax(1) == labels).sum()
            hits[1] += len(labels)
    right, seen = team.sum(hits).tolist()
    return right / seen if seen else math.nan


def progress_fields(metrics: EpochMetrics) -> dict[str, str]:
    """What the progress bar shows."""
    return {
        "loss": f"{metrics.train_loss:.3f}",
        "accuracy": f"{metrics.test_accuracy:.2%}",
        "sparsity": f"{metrics.sparsity:.2%}",
        "k/m": f"{metrics.mean_rank_ratio:.3f}",
        "images/s": f"{metrics.images_per_second:.0f}",
        "waiting for data": f"{metrics.waiting:.1%} ({bound(metrics.waiting)})",
    }
