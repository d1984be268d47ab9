"""The facts of the probe: functions that measure on the GPU and report each figure as soon as they have it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import write_json
from rates import Timing, copy_rate, matrix_timing, time_device
from torch import Tensor

DEVICE = "cuda"
SPARSITY = 0.9
TAIL_ENERGY = 0.1
Row = dict[str, Any]


@dataclass
class Report:
    """The rows of one fact; each is on disk as soon as it is added."""

    path: Path
    deadline: float  # of time.monotonic()
    rows: list[Row] = field(default_factory=list)

    def add(self, quantity: str, value: Any, unit: str = "", predicted: str | None = None, **details: Any) -> None:
        self.rows.append({"quantity": quantity, "value": value, "unit": unit, "predicted": predicted, **details})
        write_json(self.path, self.rows)

    def left(self) -> float:
        """Seconds left to this fact."""
        return self.deadline - time.monotonic()

    def attempt(self, quantity: str, seconds: float, measure: Callable[[], None]) -> None:
        """One case of several: its failure is a row, and so is its omission when less than ``seconds`` are left."""
        left = max(0.0, self.left())
        if left < seconds:
            self.add(quantity, None, skipped=f"{left:.0f} s left of this fact's time, {seconds:.0f} s wanted")
            return
        try:
            measure()
        except Exception as error:
            self.add(quantity, None, failed=f"{type(error).__name__}: {error}"[:500])


# ---- what is measured on -------------------------------------------------------------------------------------------


def resnet50_convolutions() -> list[tuple[int, int, int, int]]:
    """Weight shapes [out, in, kh, kw] of ResNet-50's 53 convolutions, in the order of the forward pass."""
    shapes = [(64, 3, 7, 7)]
    channels = 64
    for depth, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(depth):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


def sparse_weights() -> list[Tensor]:
    """Kaiming weights, the smallest 90 % of each set to zero."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = []
    for shape in resnet50_convolutions():
        weight = torch.randn(shape, device=DEVICE, generator=generator) * (2 / (shape[0] * shape[2] * shape[3])) ** 0.5
        zeros = int(SPARSITY * weight.numel() + 0.5)
        weights.append(weight * (weight.abs() > weight.abs().flatten().kthvalue(zeros).values))
    return weights


def gram_matrices() -> list[Tensor]:
    """G = X X^T / ||X||_F^2 over the shorter side, float64 [m, m], trace 1."""
    grams = []
    for weight in sparse_weights():
        x = weight.flatten(1).double()
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        grams.append(gram / gram.trace())
    return grams


def equal_size_groups(matrices: list[Tensor]) -> dict[int, Tensor]:
    """m -> [B, m, m]."""
    sizes = sorted({len(a) for a in matrices})
    return {m: torch.stack([a for a in matrices if len(a) == m]) for m in sizes}


# ---- time ----------------------------------------------------------------------------------------------------------


def time_eager_and_graph(run: Callable[[], Any], repeats: int = 20) -> tuple[Timing, Timing]:
    """One of ``repeats`` runs in a row: launched eagerly, and as a replayed CUDA graph."""

    def several() -> None:
        for _ in range(repeats):
            run()

    eager = time_device(several, repeats=repeats)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several()
    return eager, time_device(graph.replay, repeats=repeats)


# ---- stream: does a CUDA kernel of the compiled library run on torch's current stream, and in a CUDA graph? ---------


def probe_stream(report: Report) -> None:
    from rpg_fast import _extension, _ops  # noqa: F401  defines the op

    extension = _extension.load()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("rpg_fast::popcount", "CUDA"):
        outcome = extension.record.get("outcome", "no record of a build")
        raise RuntimeError(f"rpg_fast::popcount has no CUDA kernel: {extension.reason or 'library loaded'}; {outcome}")
    report.add("CUDA kernel registered", True, facts=extension.facts)

    numels = [1024 * n for n in (1, 40, 7, 3000)]  # whole segments, so that a fill of the buffer has known counts
    offsets = [sum(numels[:b]) // 8 for b in range(len(numels))]
    bits = torch.randint(256, (sum(numels) // 8,), dtype=torch.uint8, device=DEVICE)

    def count() -> Tensor:
        return torch.ops.rpg_fast.popcount(bits, offsets, numels)

    ones = (bits.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    want = [int(part.sum()) for part in ones.flatten().split(numels)]
    report.add("counts are right", count().tolist() == want, predicted="True")
    _check_side_stream(report, bits, count, numels)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = count()
    replays = []
    for byte, ones_per_byte in ((255, 8), (0, 0), (15, 4)):
        bits.fill_(byte)
        counts.fill_(-1)
        graph.replay()
        replays.append(counts.tolist() == [n // 8 * ones_per_byte for n in numels])
    report.add("graph replays see new bits", all(replays), predicted="True", replays=replays)

    masks = [a * b * c * d for a, b, c, d in resnet50_convolutions()]
    starts = [0]
    for numel in masks:
        starts.append(starts[-1] + -(-numel // 1024) * 128)
    packed = torch.randint(256, (starts[-1],), dtype=torch.uint8, device=DEVICE)
    eager, replay = time_eager_and_graph(lambda: torch.ops.rpg_fast.popcount(packed, starts[:-1], masks))
    report.add("popcount of ResNet-50's masks", replay.median * 1e3, "us", eager_us=eager.median * 1e3)
    wrong = [row["quantity"] for row in report.rows if row["value"] is False]
    if wrong:
        raise RuntimeError(f"not so: {', '.join(wrong)}")


def _check_side_stream(report: Report, bits: Tensor, count: Callable[[], Tensor], numels: list[int]) -> None:
    cycles = 400_000_000  # about 0.2 s
    sleep_ms = time_device(lambda: torch.cuda._sleep(cycles), most=3).median
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        count()  # so that what follows allocates nothing
    bits.zero_()
    torch.cuda.synchronize()

    begin = time.perf_counter()
    with torch.cuda.stream(side):
        torch.cuda._sleep(cycles)
        bits.fill_(255)
        counts = count()
        done = side.record_event()
    host_ms = (time.perf_counter() - begin) * 1e3
    early = done.query()
    side.synchronize()
    report.add("waits for its own stream", not early and counts.tolist() == numels, predicted="True")
    report.add("the host does not wait", host_ms < sleep_ms / 2, predicted="True", host_ms=host_ms, sleep_ms=sleep_ms)

    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    default_done = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(side):
        counts = count()
    side.synchronize()
    overtakes = not default_done.query()
    torch.cuda.synchronize()
    report.add("waits for no other stream", overtakes and counts.tolist() == numels, predicted="True")


# ---- product: what rate does one grouped fp16x3 product (Triton) reach on ResNet-50's 53 matrices? ------------------


def probe_product(report: Report) -> None:
    matrices = []
    for gram in gram_matrices():  # what the filter starts from: G - tau I, brought into [-1, 1]
        shifted = gram - torch.eye(len(gram), device=DEVICE, dtype=torch.float64) / len(gram)
        matrices.append((shifted / torch.linalg.matrix_norm(shifted @ shifted).sqrt()).float())
    squares = [a.double() @ a.double() for a in matrices]
    useful = sum(len(a) ** 3 for a in matrices)  # a symmetric product is half of 2 m^3
    report.add("one symmetric product of all matrices", useful / 1e9, "GFLOP", predicted="2.76")
    for name, precision in (("fp32", "highest"), ("TF32", "high")):
        title = f"five torch.bmm, {name}"
        report.attempt(title, 4, partial(_time_bmm, report, title, precision, matrices, squares))
    tilings = [(64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (64, 64, 4, 4), (64, 32, 4, 5)]
    for block, block_k, num_warps, num_stages in tilings:  # the launcher's default first
        for storage in ("pairs", "fp32"):
            title = f"{storage} {block}x{block_k} warps {num_warps} stages {num_stages}"
            options = {"block_k": block_k, "num_warps": num_warps, "num_stages": num_stages}
            measure = partial(_time_tiling, report, title, storage == "pairs", block, options, matrices, squares)
            report.attempt(title, 5, measure)


def _errors(got: list[Tensor], want: list[Tensor]) -> Row:
    each = [float((c.double() - w).norm() / w.norm()) for c, w in zip(got, want, strict=True)]
    return {"error_worst": max(each), "error_median": statistics.median(each)}


def _time_bmm(report: Report, title: str, precision: str, matrices: list[Tensor], squares: list[Tensor]) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        details = _errors([a @ a for a in matrices], squares)
        groups = [(a, torch.empty_like(a)) for a in equal_size_groups(matrices).values()]
        eager, graph = time_eager_and_graph(lambda: [torch.bmm(a, a, out=out) for a, out in groups])
    finally:
        torch.set_float32_matmul_precision("highest")
    predicted = "120" if precision == "highest" else None
    report.add(title, graph.median * 1e3, "us", predicted, eager_us=eager.median * 1e3, **details)


def _time_tiling(
    report: Report, title: str, pairs: bool, block: int, options: Row, matrices: list[Tensor], squares: list[Tensor]
) -> None:
    from rpg_fast.kernels import grouped_product as gp
    from rpg_fast.kernels import tiles

    plan = tiles.plan_tiles([len(a) for a in matrices], block=block, device=DEVICE)
    ones = torch.ones(len(matrices), device=DEVICE)
    flat = tiles.pack(matrices, plan)
    stored = tiles.split_pairs(flat, ones, plan) if pairs else flat
    scales = {} if pairs else {"left_scale": ones, "right_scale": ones}
    out = torch.full_like(stored, torch.nan)
    product = partial(gp.grouped_product, stored, stored, plan, out=out, **scales, **options)

    begin = time.perf_counter()
    product()
    torch.cuda.synchronize()
    details = {"compile_s": time.perf_counter() - begin, "tiles": len(plan.tiles)}
    details |= _errors(tiles.unpack(tiles.join_pairs(out) if pairs else out, plan), squares)
    eager, graph = time_eager_and_graph(product)
    with_addend = time_eager_and_graph(partial(product, alpha=ones, addend=stored, beta=ones))[1]

    useful = sum(len(a) ** 3 for a in matrices)
    executed = 3 * 2 * block**3 * int(plan.tiles[:, 1].sum())
    details |= {"useful_tflops": useful / graph.median / 1e9, "executed_tflops": executed / graph.median / 1e9}
    details |= {"eager_us": eager.median * 1e3, "with_addend_us": with_addend.median * 1e3, "best_us": graph.best * 1e3}
    report.add(title, graph.median * 1e3, "us", "20 to 25", **details)


# ---- eigh: how long does torch.linalg.eigh take on those matrices? --------------------------------------------------


def probe_eigh(report: Report) -> None:
    grams = gram_matrices()
    report.add("zero rows of the Gram matrices", sum(int((g.diagonal() == 0).sum()) for g in grams), "rows")
    torch.linalg.eigh(torch.eye(8, device=DEVICE).expand(2, 8, 8))  # creates the solver's handle
    for solver, way in (("eigh", "batched"), ("eigh", "looped"), ("eigvalsh", "batched")):
        for precision, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
            title = f"{solver} {precision} {way}"
            groups = equal_size_groups([g.to(dtype) for g in grams])
            report.attempt(title, 4, partial(_time_eigh, report, title, solver, way, groups))


def _time_eigh(report: Report, title: str, solver: str, way: str, groups: dict[int, Tensor]) -> None:
    solve = getattr(torch.linalg, solver)
    done: dict[str, Row] = {}
    for m, stacked in groups.items():
        if report.left() < 2:
            report.add(title, None, "ms", skipped="the time of this fact ran out", groups=done)
            return
        pieces = [stacked] if way == "batched" else list(stacked)
        solutions = [solve(piece) for piece in pieces]
        values = [s if solver == "eigvalsh" else s.eigenvectors for s in solutions]
        timing = time_device(lambda pieces=pieces: [solve(piece) for piece in pieces], most=5)
        nan = sum(int(v.isnan().any((-1, -2) if solver == "eigh" else -1).sum()) for v in values)
        done[f"{len(stacked)}x{m}"] = {"ms": timing.median, "runs": timing.runs, "matrices_with_nan": nan}
    predicted = "10 to 60" if title == "eigh fp32 batched" else None
    report.add(title, sum(group["ms"] for group in done.values()), "ms", predicted, groups=done)


# ---- rates: copy bandwidth and matrix rates --------------------------------------------------------------------------


def probe_rates(report: Report) -> None:
    report.attempt("copy", 3, partial(_time_copies, report))
    datasheet = {"bf16": "989", "fp16": "989", "TF32": "495", "fp32": "67", "fp64": "67"}
    for arithmetic, rate in datasheet.items():
        title = f"8192^3 product, {arithmetic}"
        report.attempt(title, 2, partial(_time_matmul, report, title, arithmetic, rate))


def _time_copies(report: Report) -> None:
    report.add("copy, bytes read and written", copy_rate(DEVICE) / 1e12, "TB/s", "4.8 (datasheet)")
    source, other, target = (torch.rand(2**30, device=DEVICE) for _ in range(3))  # 4 GiB each
    triad = time_device(lambda: torch.add(source, other, alpha=2.0, out=target))
    report.add("a + 2 b, bytes read and written", 3 * source.nbytes / triad.median / 1e9, "TB/s", "4.8 (datasheet)")


def _time_matmul(report: Report, title: str, arithmetic: str, datasheet: str) -> None:
    flops, timing = matrix_timing(arithmetic, DEVICE)
    report.add(title, flops / timing.median / 1e9, "TFLOP/s", f"{datasheet} (datasheet)", runs=timing.runs)


# ---- official: how long does the published loop take? ----------------------------------------------------------------


def probe_official(report: Report) -> None:
    weights = [weight.requires_grad_() for weight in sparse_weights()]
    exact_ranks, exact_tails = [], []
    for gram in gram_matrices():
        tails = torch.linalg.eigvalsh(gram).clamp(min=0).cumsum(0)
        nearest = int((tails - TAIL_ENERGY).abs().argmin())
        exact_tails.append(float(tails[nearest]))
        exact_ranks.append(len(gram) - 1 - nearest)
    loss = -statistics.mean(exact_tails)
    report.add("loss and mean k by eigvalsh in fp64", loss, mean_rank=statistics.mean(exact_ranks))
    drivers = ("default", "gesvda", "gesvdj", "gesvd")
    for position, driver in enumerate(drivers):
        title = f"published loop and gradient, {driver}"
        measure = partial(_time_loop, report, title, driver, len(drivers) - position, weights, loss, exact_ranks)
        report.attempt(title, 4, measure)


def _published_loss(weights: list[Tensor], driver: str, stop: float) -> tuple[Tensor, list[int], list[float]]:
    """The published formula, one SVD a layer in a Python loop; k and seconds of the layers begun before ``stop``."""
    total, active = torch.zeros((), device=DEVICE), 0
    ranks, seconds = [], []
    for weight in weights:
        begin = time.monotonic()
        if begin > stop:
            break
        matrix = weight.flatten(1)
        normed = matrix / torch.linalg.matrix_norm(matrix)
        named = None if driver == "default" else driver
        U, S, Vh = torch.linalg.svd(normed.detach(), full_matrices=False, driver=named)
        tails = S.square().flip(0).cumsum(0)  # [m], energy of the last 1, 2, ... directions
        k = len(S) - 1 - int((tails - TAIL_ENERGY).abs().argmin().item())
        loss = -(normed - U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]).square().sum()
        if loss.item() != 0:
            total, active = total + loss, active + 1
        ranks.append(k)
        seconds.append(time.monotonic() - begin)
    return total / max(active, 1), ranks, seconds


def _time_loop(
    report: Report, title: str, driver: str, share: int, weights: list[Tensor], exact: float, exact_ranks: list[int]
) -> None:
    """Runs the loop until its share of the time that is left is spent, five times at most."""
    named = None if driver == "default" else driver
    torch.linalg.svd(torch.randn(32, 64, device=DEVICE), full_matrices=False, driver=named)  # creates the handle
    torch.cuda.synchronize()
    stop = time.monotonic() + report.left() / share
    times: list[float] = []
    while not times or (len(times) < 5 and time.monotonic() + times[-1] < stop):
        begin = time.monotonic()
        loss, ranks, seconds = _published_loss(weights, driver, stop)
        if len(ranks) < len(weights):
            partly = f"{len(ranks)} of {len(weights)} layers took {sum(seconds):.1f} s, its share of the time"
            report.add(title, None, "ms", skipped=partly, slowest_layer_ms=max(seconds) * 1e3)
            return
        loss.backward()
        torch.cuda.synchronize()
        times.append(time.monotonic() - begin)
    layers: dict[str, float] = {}
    for weight, second in zip(weights, seconds, strict=True):
        shape = "x".join(map(str, weight.flatten(1).shape))
        layers[shape] = layers.get(shape, 0.0) + second * 1e3
    details = {
        "runs": len(times),
        "loss_error": abs(loss.item() - exact) / abs(exact),
        "ranks_differing": sum(a != b for a, b in zip(ranks, exact_ranks, strict=True)),
        "layers_ms": layers,
    }
    report.add(title, statistics.median(times) * 1e3, "ms", **details)
