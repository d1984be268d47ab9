"""Calls every CUDA kernel of the compiled library once at awkward sizes, for compute-sanitizer to watch.

Fails if an op has a CUDA kernel that is not called here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from rpg_fast import _extension, _ops

SEGMENT_BYTES = 128


def popcount() -> None:
    numels = [0, 1, 7, 1023, 1024, 1025, 40_000]
    offsets, end = [], 0
    for numel in numels:
        offsets.append(end)
        end += -(-numel // (8 * SEGMENT_BYTES)) * SEGMENT_BYTES
    masks = [torch.rand(numel, device="cuda") < 0.5 for numel in numels]
    bits = torch.ops.rpg_fast.pack(masks, offsets, end)
    got = torch.ops.rpg_fast.popcount(bits, offsets, numels).tolist()
    want = [int(mask.sum()) for mask in masks]
    if got != want:
        raise AssertionError(f"popcount gave {got}, want {want}")


CALLS: dict[str, Callable[[], None]] = {"popcount": popcount}


def main() -> int:
    extension = _extension.load()
    if not extension.loaded:
        print(f"sanitize: {extension.reason}", file=sys.stderr)
        return 1
    with_cuda = {
        name for name in _ops.SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(f"rpg_fast::{name}", "CUDA")
    }
    if with_cuda != set(CALLS):
        print(f"sanitize: CUDA kernels of {sorted(with_cuda)}, calls for {sorted(CALLS)}", file=sys.stderr)
        return 1
    for name, call in CALLS.items():
        call()
        torch.cuda.synchronize()
        print(f"sanitize: {name} ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
