"""RankPruner(semantics="official") against the published rules, and each of their peculiarities by itself; what the
numbers mean stands in docs/fidelity.md."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_rules import PublishedProgram, PublishedRecipe, published_rank, published_rank_loss
from torch import Tensor, nn

from rpg_fast import MaskedSGD, RankPruner, prunable_weights

Gradients = dict[str, Tensor]


class Net(nn.Module):
    """Three convolutions, a linear layer and no bias, in float64: 1,680 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.b = nn.Conv2d(8, 16, 3, bias=False)
        self.c = nn.Conv2d(16, 12, 1, bias=False)
        self.head = nn.Linear(12, 10, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:  # x: [B, 3, 7, 7]
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.c(x)).mean((2, 3)))


class Pair:
    """The same run twice: a RankPruner with an optimizer, and the published program."""

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        sparsity: float = 0.8,
        **settings: Any,
    ):
        self.net, self.settings = net, {"sparsity": sparsity, **settings}
        self.optimizer = optimizer(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.pruner = RankPruner(net, self.optimizer, semantics="official", **self.settings)
        self.weights = prunable_weights(net)
        convolutions = [name for name, w in self.weights.items() if w.dim() == 4]
        recipe = PublishedRecipe(
            round(1 - sparsity, 6), lr=lr, momentum=momentum, weight_decay=weight_decay, **settings
        )
        self.published = PublishedProgram({n: w.cpu() for n, w in self.weights.items()}, convolutions, recipe)

    def gradients(self, draw: Callable[[torch.Size], Tensor] | None = None) -> Gradients:
        draw = draw or (lambda shape: 0.1 * torch.randn(shape, dtype=torch.float64))
        return {name: draw(w.shape) for name, w in self.weights.items()}

    def step(self, *micro_batches: Gradients) -> bool:
        """One step of both; the pruner is given the mean of the micro-batches."""
        for name, w in self.weights.items():
            mean = sum(g[name] for g in micro_batches) / len(micro_batches)
            w.grad = torch.empty_like(w).copy_(mean)
        if took_step := self.pruner.step():
            self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.published.step([micro_batches]) == took_step
        return took_step

    def masks(self) -> dict[str, Tensor]:
        return {name: mask.cpu() for name, mask in self.pruner.masks.unpack().items()}

    def agree(self) -> None:
        for name, mask in self.masks().items():
            assert torch.equal(mask, self.published.masks[name]), f"step {self.published.t}: mask of {name}"
            wanted = self.published.weights[name]
            torch.testing.assert_close(self.weights[name].detach().cpu(), wanted, rtol=0, atol=1e-12)

    def active(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks().values())

    def adopt(self) -> None:
        """The published program goes on from where the pruner stands."""
        self.published.masks = self.masks()
        for name, w in self.weights.items():
            self.published.weights[name] = w.detach().cpu().clone()
            buffer = self.optimizer.state[w].get("momentum_buffer")
            if buffer is not None:
                self.published.momenta[name] = buffer.cpu().clone()


USUAL: dict[str, Any] = {
    "total_steps": 198,
    "update_every": 3,
    "prune_until": 0.8,
    "update_until": 0.95,  # 62 updates, the last ten of them at the final density
    "rank_weight": 0.5,
    "tail_energy": 0.2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "every 5 steps": {"update_every": 5, "total_steps": 330},
    "no rank loss": {"rank_weight": 0.0},
    "two steps of gradients": {"grow_steps": 2, "momentum": 0.9},
    "prune only": {"drop_fraction": 0.0},
    "prune only, momentum, two steps": {"drop_fraction": 0.0, "momentum": 0.9, "grow_steps": 2, "rank_weight": 5.0},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 1e-3},
    "MaskedSGD": {"momentum": 0.9, "weight_decay": 1e-3, "optimizer": MaskedSGD},
    "MaskedSGD, two steps": {"momentum": 0.9, "grow_steps": 2, "optimizer": MaskedSGD},
    "MaskedSGD, prune only": {"momentum": 0.9, "drop_fraction": 0.0, "optimizer": MaskedSGD},
    "channels_last": {"momentum": 0.9},
    "channels_last, MaskedSGD, two steps": {"momentum": 0.9, "grow_steps": 2, "optimizer": MaskedSGD},
    "target never reached": {"prune_until": 0.9, "update_until": 0.901},
    "end on an update": {"prune_until": 0.9, "update_until": 0.9, "total_steps": 200, "momentum": 0.9},
    "end inside a window": {"update_until": 0.94, "total_steps": 200, "grow_steps": 2, "update_every": 3},
    "sparse layers only": {"min_sparsity": 0.5},
    "98 %": {"sparsity": 0.98, "momentum": 0.9},
    "thresholds of zero": {"sparsity": 0.996},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_and_weights_equal_the_published_ones_step_by_step(name: str, device: torch.device) -> None:
    memory_format = torch.channels_last if "channels_last" in name else torch.contiguous_format
    pair = Pair(Net().to(device, memory_format=memory_format), **{**USUAL, **SETTINGS[name]})
    everything_back = 0
    for _ in range(pair.settings["total_steps"]):
        pair.step(pair.gradients())
        pair.agree()
        everything_back += pair.active() == 1680 and pair.published.updates_done > 1
    assert pair.published.updates_done >= 58
    assert (everything_back > 0) == (name == "thresholds of zero")
    sparsity = pair.pruner.finalize()
    pair.agree()  # finalize repairs nothing here
    assert sparsity == pytest.approx(1 - pair.active() / 1680, abs=1e-6)


def test_training_on_data_equals_the_published_program() -> None:
    pair = Pair(Net(), **{**USUAL, "momentum": 0.9, "weight_decay": 1e-3, "total_steps": 66})
    x, y = torch.randn(16, 3, 7, 7, dtype=torch.float64), torch.arange(16) % 10
    names = list(pair.weights)
    for _ in range(66):
        leaves = {name: w.clone().requires_grad_() for name, w in pair.published.weights.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(pair.net, leaves, (x,)), y)
        published_gradients = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        nn.functional.cross_entropy(pair.net(x), y).backward()
        if took_step := pair.pruner.step():
            pair.optimizer.step()
        pair.optimizer.zero_grad()
        assert pair.published.step([[published_gradients]]) == took_step
        pair.agree()
    assert pair.active() < 400


@pytest.mark.parametrize("drop_fraction", [0.0, 0.3, 0.5])
def test_with_ties_the_counts_are_the_published_ones(drop_fraction: float, device: torch.device) -> None:
    """Which of equal scores wins is chance there. So each update starts from the same place."""
    net = Net().to(device)
    with torch.no_grad():
        for w in net.parameters():
            w.copy_(torch.randint(-3, 4, w.shape) / 8)
    settings = {"lr": 0.125, "momentum": 0.5, "drop_fraction": drop_fraction, "rank_weight": 0.0}
    pair = Pair(net, **{**USUAL, **settings})
    for _ in range(198):
        pair.step(pair.gradients(lambda shape: torch.randint(-2, 3, shape).double()))
        wanted = {name: int(mask.sum()) for name, mask in pair.published.masks.items()}
        assert {name: int(mask.sum()) for name, mask in pair.masks().items()} == wanted, pair.published.t
        pair.adopt()
    assert pair.published.updates_done == 62


# ----------------------------------------------------------------------------------------------- one layer, two updates


def two_updates(
    weights: Tensor,
    sparsity: float,
    semantics: str,
    *,
    gradient: Tensor | None = None,
    after_first: Callable[[Tensor, Tensor], None] = lambda weights, mask: None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear layer of these weights through the first update, where the schedule still stands at 0 %, and the second,
    where it stands at the target; the learning rate is 0. Returns mask, weights and momentum."""
    layer = nn.Linear(len(weights), 1, bias=False, dtype=weights.dtype)
    layer.weight.data.copy_(weights)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    plan = {"total_steps": 10, "update_every": 3, "prune_until": 0.3, "update_until": 0.95, **settings}
    pruner = RankPruner(layer, optimizer, sparsity=sparsity, semantics=semantics, **plan)
    for step in range(1, 7):
        layer.weight.grad = torch.zeros_like(layer.weight) if gradient is None else gradient.clone().view(1, -1)
        if pruner.step():
            optimizer.step()
        if step == 3:
            after_first(layer.weight.detach().flatten(), pruner.masks.unpack()["weight"].flatten())
    buffer = optimizer.state[layer.weight]["momentum_buffer"]
    return pruner.masks.unpack()["weight"].flatten(), layer.weight.detach().flatten(), buffer.flatten()


def kept(weights: Tensor, sparsity: float, semantics: str, **settings: Any) -> int:
    return int(two_updates(weights, sparsity, semantics, **settings)[0].sum())


def shuffled(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values))]


# -------------------------------------------------------------------------------------------- peculiarities, one by one


def test_q_r1_the_rank_loss_only_steers_growth() -> None:
    without = Pair(Net(), **{**USUAL, "rank_weight": 0.0})
    net = copy.deepcopy(without.net)
    heavy = Pair(net, **{**USUAL, "rank_weight": 50.0})
    for step in range(1, 7):
        gradients = without.gradients()
        before = {name: w.detach().clone() for name, w in heavy.weights.items()}
        assert without.step(gradients) == heavy.step(gradients) == (step % 3 != 0)
        for name, w in heavy.weights.items():
            if step < 6:  # fifty times the rank loss, and so far no weight has felt it
                assert torch.equal(w, without.weights[name])
            else:  # the update chooses other weights to grow, and moves none of those that stay
                stayed = w != 0
                assert torch.equal(w[stayed], before[name][stayed])
    for name, mask in without.masks().items():
        assert torch.equal(mask, heavy.masks()[name]) == (name == "head.weight")


def test_q_r1_the_exception_the_last_evaluation_moves_weights_if_updates_end_on_a_multiple() -> None:
    for semantics, moves in (("official", True), ("corrected", False)):
        net = Net()
        pruner = RankPruner(
            net,
            torch.optim.SGD(net.parameters(), lr=0.0),
            sparsity=0.5,
            total_steps=10,
            update_every=4,
            prune_until=0.8,
            update_until=0.8,
            rank_weight=3.0,
            semantics=semantics,
        )
        took_step = []
        for _ in range(8):
            for w in net.parameters():
                w.grad = torch.zeros_like(w)
            took_step.append(pruner.step())
        assert took_step == [True, True, True, False, True, True, True, moves]
        if moves:
            convolutions = [net.a.weight, net.b.weight, net.c.weight]
            gradients = torch.autograd.grad(3 * published_rank_loss(convolutions, 0.1), convolutions)
            masks = pruner.masks.unpack()
            for name, w, g in zip("abc", convolutions, gradients, strict=True):
                torch.testing.assert_close(w.grad, g * masks[f"{name}.weight"], rtol=1e-9, atol=1e-12)


STAIRS = torch.tensor([10.0, 9.0, 7.0, 5.0, 1.0]).double() / 16  # tail energies 1, 26, 75, 156 and 256, of 256


def rank_loss_of(matrices: list[Tensor], tail_energy: float, semantics: str) -> tuple[float, list[Tensor]]:
    """What a pruner evaluates at its first update for convolutions with these matrices, and the gradients it adds."""
    net = nn.Sequential(*(nn.Conv2d(M.shape[1], M.shape[0], 1, bias=False, dtype=M.dtype) for M in matrices))
    for layer, M in zip(net, matrices, strict=True):
        layer.weight.data.copy_(M[:, :, None, None])
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    plan: dict[str, Any] = {"total_steps": 10, "update_every": 2, "drop_fraction": 0.0, "rank_weight": 1.0}
    pruner = RankPruner(net, optimizer, sparsity=0.0625, tail_energy=tail_energy, semantics=semantics, **plan)
    assert pruner.step()
    assert pruner.last_rank_loss is None
    assert pruner.step() == (semantics == "official")  # which trains at an update that grows nothing
    return float(pruner.last_rank_loss), [layer.weight.grad[:, :, 0, 0] for layer in net]


@pytest.mark.parametrize(
    ("tail_energy", "k"),
    [(40 / 256, 3), (60 / 256, 2), (50.5 / 256, 3), (0.001, 4), (0.5, 1), (1.0, 0)],
    ids=["nearest, not the first beyond", "nearest", "ties to the larger", "never all", "half", "everything"],
)
def test_q_r3_the_target_is_the_nearest_tail_energy(tail_energy: float, k: int) -> None:
    tail = (STAIRS[k:] ** 2).sum().item()
    assert published_rank(STAIRS**2, tail_energy) == k
    for semantics in ("official", "corrected"):
        loss, (gradient,) = rank_loss_of([STAIRS.diag()], tail_energy, semantics)
        assert loss == pytest.approx(-tail, abs=1e-12)
    loss, (gradient,) = rank_loss_of([STAIRS.diag()], tail_energy, "official")
    left = torch.cat([torch.zeros(k).double(), STAIRS[k:]])
    torch.testing.assert_close(gradient, -2 * (left - tail * STAIRS).diag(), rtol=0, atol=1e-12)


def test_q_r5_the_divisor_is_the_number_of_layers_with_a_tail() -> None:
    stairs, lone, nothing = STAIRS.diag(), torch.zeros(5, 5).double(), torch.zeros(5, 5).double()
    lone[1, 2] = 2.0  # rank one exactly: nothing is left beside it
    whole, (alone,) = rank_loss_of([stairs], 0.2, "official")
    for others in ([lone], [nothing], [lone, nothing]):
        loss, gradients = rank_loss_of([stairs, *others], 0.2, "official")
        assert loss == pytest.approx(whole, abs=1e-12)
        torch.testing.assert_close(gradients[0], alone)
        assert all(float(g.abs().max()) < 1e-12 for g in gradients[1:])
    assert rank_loss_of([stairs, lone, nothing], 0.2, "corrected")[0] == pytest.approx(whole / 2, abs=1e-12)


def test_q_r6_the_first_and_the_linear_layer_are_pruned_and_every_convolution_has_a_rank_loss() -> None:
    pair = Pair(Net(), **{**USUAL, "drop_fraction": 0.0})
    for _ in range(3):
        pair.step(pair.gradients())
    convolutions = [pair.published.weights[f"{name}.weight"] for name in "abc"]
    assert pair.active() == 1680  # dense, and yet active: the threshold for sparsity is 0
    assert pair.published.rank_loss == pytest.approx(published_rank_loss(convolutions, 0.2).item(), rel=0.1)
    assert float(pair.pruner.last_rank_loss) == pytest.approx(pair.published.rank_loss, rel=1e-9)
    for _ in range(30):
        pair.step(pair.gradients())
    assert all(not bool(mask.all()) for mask in pair.masks().values())


def test_q_r7_the_first_update_changes_nothing() -> None:
    for semantics, wanted in (("official", 1024), ("corrected", 512)):
        active: list[int] = []
        after_first = lambda weights, mask, active=active: active.append(int(mask.sum()))  # noqa: E731
        kept(torch.randn(1024).double(), 0.5, semantics, after_first=after_first)
        assert active == [wanted]
    pair = Pair(Net(), **USUAL)
    pair.step(pair.gradients())
    pair.step(pair.gradients())
    before = copy.deepcopy(pair.net.state_dict())
    assert not pair.step(pair.gradients())
    assert all(torch.equal(w, before[name]) for name, w in pair.net.state_dict().items())


def updates_and_density(total_steps: int, sparsity: float, semantics: str, **settings: Any) -> dict[int, float]:
    """The steps at which the topology is updated and the density after each, for one layer that is never trained. Its
    size, a power of two, keeps the counts whole."""
    layer = nn.Linear(2**14, 1, bias=False)
    layer.weight.data.copy_(shuffled(torch.arange(1, 2**14 + 1)))
    optimizer = MaskedSGD(layer.parameters(), lr=0.0)
    layer.weight.grad = torch.ones_like(layer.weight)
    # so small a fraction drops nothing, but an update still shows: step returns False
    plan = {"drop_fraction": 1e-9, "semantics": semantics, **settings}
    pruner = RankPruner(layer, optimizer, sparsity=sparsity, total_steps=total_steps, **plan)
    found = {}
    for step in range(1, total_steps + 1):
        if not pruner.step():
            found[step] = int(pruner.masks.count()) / 2**14
    return found


def test_q_r8_short_runs_miss_the_target() -> None:
    published = updates_and_density(10_000, 0.9, "official")
    assert list(published) == list(range(100, 9001, 100))
    assert published[9000] == pytest.approx(0.1026, abs=1e-4)
    assert list(updates_and_density(10_000, 0.9, "corrected").values())[-1] == pytest.approx(0.1, abs=1 / 2**14)
    # the authors' CIFAR-10 setting: 300 epochs of 390 steps, pruned and updated until 80 % of them, to 99.9 %
    cifar = updates_and_density(117_000, 0.999, "official", prune_until=0.8, update_until=0.8)
    reached = 0.001 ** (934 / 936)
    assert reached == pytest.approx(0.001015, abs=1e-6)
    assert max(cifar) == 93_500
    assert cifar[93_500] == (2**14 - round((1 - reached) * 2**14) + 1) / 2**14


def test_q_r9_the_published_length_has_two_updates_at_the_final_density() -> None:
    published = updates_and_density(125_100, 0.9, "official")
    assert list(published) == list(range(100, 112_701, 100))
    final = (2**14 - round(0.9 * 2**14) + 1) / 2**14
    assert [step for step, density in published.items() if density == final] == [112_600, 112_700]
    corrected = updates_and_density(125_100, 0.9, "corrected")
    exact = (2**14 - round(0.9 * 2**14)) / 2**14
    assert [step for step, density in corrected.items() if density == exact] == [112_500, 112_600, 112_700]
    program = PublishedProgram({"w": torch.zeros(2, 2)}, [], PublishedRecipe(0.1, 125_100, 100))
    for step in (112_600, 112_700):  # nothing grows there: of a million active weights, not one
        assert 0.3 / 2 * (1 + math.cos(step * math.pi / program.updates_end)) < 1e-6


def test_q_r2_the_rank_loss_is_computed_once_an_update() -> None:
    program = PublishedProgram({"w": torch.zeros(2, 2)}, [], PublishedRecipe(0.1, 125_100, 100))
    evaluations = 0
    for program.t in range(125_100):
        evaluations += program.window_is_open()
    assert evaluations == 1127
    pair, values = Pair(Net(), **USUAL), []
    for _ in range(198):
        pair.step(pair.gradients())
        values.append(pair.pruner.last_rank_loss)
    assert len({id(value) for value in values if value is not None}) == pair.published.updates_done == 62


def test_q_r10_the_threshold_keeps_one_more_and_all_ties() -> None:
    distinct = shuffled(torch.arange(1.0, 1025.0))
    assert kept(distinct, 0.875, "official", drop_fraction=0.0) == 1024 - 896 + 1
    assert kept(distinct, 0.875, "corrected", drop_fraction=0.0) == 1024 - 896
    tied = shuffled(torch.arange(1.0, 1025.0).clamp(max=890))  # 135 share the place of the 896th
    assert kept(tied, 0.875, "official", drop_fraction=0.0) == 135
    assert kept(tied, 0.875, "corrected", drop_fraction=0.0) == 128
    odd = shuffled(torch.arange(1.0, 202.0))  # 100.5 are to be cut: rounded to the even number, 100
    assert kept(odd, 0.5, "official", drop_fraction=0.0) == 102


def test_q_r11_zeros_at_the_threshold_bring_every_weight_back() -> None:
    weights = torch.zeros(1000)
    weights[:53] = torch.randn(53).sign() * torch.rand(53).add(1)
    assert kept(shuffled(weights), 0.9, "official") == 1000  # 947 zeros and 900 to cut
    assert kept(shuffled(weights), 0.9, "corrected") == 100
    assert kept(shuffled(weights), 0.95, "official") == int((1 - 949 / 1000) * 1000)  # 950 to cut: all is well


def test_q_r12_counts_are_truncated() -> None:
    n = 589_824  # a convolution from 256 to 256 channels, 3 x 3
    threshold_keeps = n - round(0.9 * n) + 1
    assert threshold_keeps == 58_983
    weights = shuffled(torch.arange(1.0, n + 1))
    assert kept(weights, 0.9, "official", drop_fraction=0.0) == 58_982
    assert kept(weights, 0.9, "corrected", drop_fraction=0.0) == n - round(0.9 * n)
    lost = sum(int((1 - (n - keep) / n) * n) != keep for keep in range(1, n, 37)) / len(range(1, n, 37))
    assert 0.15 < lost < 0.18


def test_q_r13_pruned_and_grown_restarts_at_zero_dropped_and_grown_goes_on() -> None:
    n, pruned, dropped = 128, 10, 65
    weights = torch.arange(1.0, n + 1).double()  # the threshold at 50 % is weight 64, at index 63
    gradient = torch.full((n,), 0.5).double()
    gradient[pruned], gradient[dropped] = 2.0, 1.0
    mask, found, momentum = two_updates(weights, 0.5, "official", gradient=gradient, update_until=1.0)
    assert mask[pruned]
    assert mask[dropped]
    assert not mask[63]  # dropped for good
    assert int(mask.sum()) == 65
    assert found[pruned] == 0
    assert found[dropped] == weights[dropped]
    assert momentum[pruned] > 0  # the momentum of both goes on: only what is masked in the end is masked
    assert momentum[dropped] > 0
    assert momentum[63] == 0
    mask, found, momentum = two_updates(weights, 0.5, "corrected", gradient=gradient, update_until=1.0)
    assert mask[pruned]
    assert found[pruned] == 0
    assert momentum[pruned] == 0


@pytest.mark.parametrize("grow_steps", [1, 2])
def test_q_r16_micro_batches_are_summed_which_changes_no_choice(grow_steps: int) -> None:
    pair = Pair(Net(), **{**USUAL, "momentum": 0.9, "grow_steps": grow_steps})
    for _ in range(66):
        gradients = [pair.gradients() for _ in range(4)]
        pair.step(*gradients)
        pair.agree()
        if pair.published.t == 3:
            mean = sum(g["head.weight"] for g in gradients) / 4
            assert pair.published.sums is not None
            summed = pair.published.sums[0]["head.weight"]
            if grow_steps == 1:
                torch.testing.assert_close(summed, 4 * mean)  # the score of the whole batch, four times over
    assert pair.active() < 1200


# ------------------------------------------------------------------------------------ what a run meets beside its rules


@pytest.mark.parametrize("interrupted_at", [1, 32, 101, 119, 150], ids=lambda step: f"step {step}")
@pytest.mark.parametrize("grow_steps", [1, 2])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(interrupted_at: int, grow_steps: int) -> None:
    """Of two steps whose gradients count, steps 32, 101 and 119 are the first. Step 102 reaches the final density; from
    then on the published program no longer asks what is sparse, but remembers."""
    schedule = {"prune_until": 0.5, "update_until": 1.0, "drop_fraction": 0.5}
    pair = Pair(Net(), **{**USUAL, **schedule, "momentum": 0.9, "grow_steps": grow_steps})
    for _ in range(interrupted_at):
        pair.step(pair.gradients())
    file = io.BytesIO()
    torch.save([pair.net.state_dict(), pair.optimizer.state_dict(), pair.pruner.state_dict()], file)
    file.seek(0)
    net = Net()
    resumed = Pair(net, momentum=0.9, **pair.settings)
    for part, state in zip((net, resumed.optimizer, resumed.pruner), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed.published = pair.published
    for _ in range(198 - interrupted_at):
        resumed.step(pair.gradients())
        resumed.agree()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(value: float) -> None:
    pair = Pair(Net(), **{**USUAL, "momentum": 0.9})
    for _ in range(32):
        pair.step(pair.gradients())
    masks, state = pair.masks(), copy.deepcopy((pair.net.state_dict(), pair.optimizer.state_dict()["state"]))
    for name, g in pair.gradients().items():
        pair.weights[name].grad = g
    pair.net.b.weight.grad.view(-1)[7] = value
    assert not pair.pruner.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in pair.masks().items())
    assert all(torch.equal(w, state[0][name]) for name, w in pair.net.state_dict().items())
    for i, w in enumerate(pair.optimizer.state_dict()["state"].values()):
        torch.testing.assert_close(w["momentum_buffer"], state[1][i]["momentum_buffer"], rtol=0, atol=0)
    pair.published.t, pair.published.updates_done = 33, 11
    for _ in range(60):  # and the updates that follow are those of their steps
        pair.step(pair.gradients())
        pair.agree()


def test_q_r15_several_processes_grow_by_the_mean_of_magnitudes() -> None:
    """Of the published program alone: where processes disagree about a gradient's sign, it grows a weight that one
    process with the whole batch would not. One process, or one gradient for all, is what RankPruner reproduces."""
    torch.manual_seed(0)
    net = Net()
    weights = {name: w.detach() for name, w in net.named_parameters()}
    recipe = PublishedRecipe(0.2, 198, 3, prune_until=0.8, update_until=0.95)
    together, apart = PublishedProgram(weights, [], recipe), PublishedProgram(weights, [], recipe)
    for step in range(1, 7):
        local = [{name: torch.randn_like(w) for name, w in weights.items()} for _ in range(2)]
        mean = {name: (local[0][name] + local[1][name]) / 2 for name in weights}
        together.step([[mean]])
        apart.step([[local[0]], [local[1]]])
        for name in weights:
            assert step == 6 or torch.equal(together.masks[name], apart.masks[name])
            torch.testing.assert_close(
                together.weights[name] * apart.masks[name], apart.weights[name] * together.masks[name]
            )
            assert int(together.masks[name].sum()) == int(apart.masks[name].sum())
    different = sum(int((together.masks[name] != apart.masks[name]).sum()) for name in weights)
    inactive = sum(int((~mask).sum()) for mask in together.masks.values())
    assert different > inactive / 2
