"""The training loop: how rpg_fast is used, step by step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rpg_fast

from .config import TrainConfig, UserError
from .data import Batches, Dataset
from .layers import network_statistics

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.csv. Accuracies and sparsity are fractions, `lr` and `rank_loss` the last ones (NaN: none),
    ranks means over the convolutions. `sparsity` is the masks', where weights just grown count although they are 0."""

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


class Trainer:
    """One model in training: its data, its optimizer and, where it is to become sparse, its pruner.

    Args:
        model: on its device and in its memory format already.
        dataset: on the same device.
        name: of the run in the metrics: "dense" or "sparse".
        sparse: attach a `rpg_fast.RankPruner`.

    Raises:
        UserError: the data, the optimizer or the pruner does not accept the configuration.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, config: TrainConfig, *, name: str, sparse: bool):
        self.model, self.config, self.name = model, config, name
        self.device = next(model.parameters()).device
        self.order = torch.Generator().manual_seed(config.seed)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        try:
            self.train_batches = Batches(
                dataset, dataset.train, config.batch_size, generator=self.order, memory_format=memory_format(config)
            )
            self.total_steps = len(self.train_batches) * config.epochs
            self.optimizer = make_optimizer(model, config)
            self.pruner = make_pruner(model, self.optimizer, self.total_steps, config) if sparse else None
        except ValueError as error:
            raise UserError(str(error)) from error
        self.test_batches = evaluation_batches(dataset, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.autocast == "fp16")
        self.epoch = self.step = 0

    def run(self, on_epoch: Callable[[EpochMetrics], None]) -> None:
        """Trains to the last epoch; `on_epoch` gets the figures after each.

        Raises:
            UserError: the weights are no longer finite.
        """
        terminal = sys.stderr.isatty()
        with tqdm(total=self.total_steps, initial=self.step, desc=self.name, unit="step", disable=not terminal) as bar:
            while self.epoch < self.config.epochs:
                metrics = self.train_epoch(bar)
                on_epoch(metrics)
                fields = progress_fields(metrics)
                if terminal:
                    bar.set_postfix(fields)
                else:
                    figures = "  ".join(f"{name} {value}" for name, value in fields.items())
                    print(f"{self.name}  epoch {metrics.epoch:>3}/{self.config.epochs}  {figures}", flush=True)
                if not math.isfinite(metrics.mean_rank_ratio):
                    raise UserError(
                        f"the {self.name} training diverged, its weights are not finite after epoch {self.epoch}: "
                        "a smaller --lr or a longer --warmup-epochs may help"
                    )

    def train_epoch(self, bar: tqdm) -> EpochMetrics:
        """One pass over the training images, then one over the test images. Reads from the device once."""
        self.model.train()
        loss_sum = torch.zeros((), device=self.device)
        hits = torch.zeros((), device=self.device, dtype=torch.int64)
        start = time.perf_counter()
        for images, labels in self.train_batches:
            batch_loss, batch_hits = self.train_step(images, labels)
            loss_sum += batch_loss
            hits += batch_hits
            bar.update()
        seen = len(self.train_batches) * self.config.batch_size
        train_loss, train_accuracy = loss_sum.item() / seen, hits.item() / seen  # waits for the device
        seconds = time.perf_counter() - start
        self.epoch += 1

        statistics = network_statistics(self.model, self.config.tail_energy)
        rank_loss = None if self.pruner is None else self.pruner.last_rank_loss
        if self.pruner is not None:
            self.pruner.settle()
        return EpochMetrics(
            run=self.name,
            epoch=self.epoch,
            step=self.step,
            lr=self.optimizer.param_groups[0]["lr"],
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_accuracy=accuracy(self.model, self.test_batches, self.config),
            sparsity=0.0 if self.pruner is None else 1 - int(self.pruner.masks.count().sum()) / statistics.size,
            rank_loss=math.nan if rank_loss is None else float(rank_loss),
            mean_rank_ratio=statistics.mean_rank_ratio,
            effective_rank=statistics.effective_rank,
            dead_filters=statistics.dead_filters,
            images_per_second=seen / seconds,
        )

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on images [B, C, H, W] and labels [B]. Returns summed loss and hits, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.config)

        loss_sum = torch.zeros((), device=self.device)
        hits = torch.zeros((), device=self.device, dtype=torch.int64)
        parts = self.config.accumulate
        for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):  # micro-batches
            with autocast(self.device, self.config):
                logits = self.model(x)  # [b, classes]
                loss = self.criterion(logits, y)
            self.scaler.scale(loss * (len(y) / len(labels))).backward()
            loss_sum += loss.detach() * len(y)
            hits += (logits.detach().argmax(1) == y).sum()

        self.scaler.unscale_(self.optimizer)
        # The pruner adds the rank gradient when it is due. On a step that moves the masks the optimizer has to rest.
        if self.pruner is None or self.pruner.step():
            self._clip_gradients()
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return loss_sum, hits

    def _clip_gradients(self) -> None:
        limit = self.config.clip_grad_norm
        if limit is not None and self.pruner is None:
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        elif limit is not None and self.pruner is not None:
            self.pruner.clip_grad_norm_(limit)

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, the weights apart."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "order": self.order.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the model's weights are to be loaded before."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.order.set_state(state["order"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on the weights of convolutions and linear layers and on nothing else."""
    weights = list(rpg_fast.prunable_weights(model).values())
    decayed = {id(weight) for weight in weights}
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    lr = learning_rate(0, 1, config)
    if config.optimizer == "sgd":
        sgd = rpg_fast.MaskedSGD if config.optimizer_impl == "masked" else torch.optim.SGD
        return sgd(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
    adamw = rpg_fast.MaskedAdamW if config.optimizer_impl == "masked" else torch.optim.AdamW
    return adamw(groups, lr=lr)


def make_pruner(
    model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, config: TrainConfig
) -> rpg_fast.RankPruner:
    """The pruner. By default it updates its masks every 100 steps as published; in a run too short for 50 such updates
    more often, but not below every 5 steps, since a step with an update trains nothing."""
    update_every = min(100, max(5, total_steps // 50), max(1, int(config.prune_until * total_steps)))
    device = next(model.parameters()).device
    return rpg_fast.RankPruner(
        model,
        optimizer,
        sparsity=config.sparsity,
        total_steps=total_steps,
        distribution=config.distribution,
        criterion=config.criterion,
        schedule=config.schedule,
        update_every=config.update_every or update_every,
        prune_until=config.prune_until,
        update_until=config.update_until,
        drop_fraction=config.drop_fraction,
        rank_weight=config.rank_weight,
        rank_every=config.rank_every,
        tail_energy=config.tail_energy,
        rank_method=config.rank_method,
        min_sparsity=config.min_sparsity,
        generator=torch.Generator(device).manual_seed(config.seed),
    )


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear over the warm-up, then half a cosine down to zero, anew at every step."""
    warmup = config.warmup / config.epochs * total_steps
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """The precision of forward passes: fp32, or mixed with bf16 or fp16."""
    return torch.autocast(device.type, dtype=AUTOCAST.get(config.autocast or ""), enabled=config.autocast is not None)


def place(model: nn.Module, device: torch.device, config: TrainConfig) -> nn.Module:
    """The model on its device, its weights in the memory format of the images."""
    return model.to(device=device, memory_format=memory_format(config))  # type: ignore[call-overload]


def memory_format(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def evaluation_batches(dataset: Dataset, config: TrainConfig) -> Batches:
    """The test images in their order. No gradients are kept, so that a batch may be larger than in training."""
    return Batches(dataset, dataset.test, 4 * config.batch_size, memory_format=memory_format(config))


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, config: TrainConfig) -> float:
    """The fraction of images whose class gets the largest logit; leaves the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    hits = torch.zeros((), device=device, dtype=torch.int64)
    for images, labels in batches:
        with autocast(device, config):
            hits += (model(images).argmax(1) == labels).sum()
    return hits.item() / len(batches.split)


def progress_fields(metrics: EpochMetrics) -> dict[str, str]:
    """What the progress bar shows."""
    return {
        "loss": f"{metrics.train_loss:.3f}",
        "accuracy": f"{metrics.test_accuracy:.2%}",
        "sparsity": f"{metrics.sparsity:.2%}",
        "k/m": f"{metrics.mean_rank_ratio:.3f}",
        "images/s": f"{metrics.images_per_second:.0f}",
    }
