"""Whether cutting a small model over GPUs can pay at all: an estimate from bytes and latencies. Torch-free.

A decode step of few tokens lasts as long as its weights are read. tp ranks read them tp times as fast, and sum what
they computed twice a layer.
"""

from __future__ import annotations

from megalite.planner.cost import SUMS
from megalite.planner.devices import Device


def tp_warning(device: Device, *, tp: int, rank_weight_bytes: int, layers: int) -> str | None:
    """Why generation with this tp is likely slower than on one GPU; None if it is not.

    `rank_weight_bytes`: of one rank of a stage with `layers` layers.
    """
    if tp == 1:
        return None
    saved = (tp - 1) * rank_weight_bytes / device.read
    sums = SUMS * layers
    spent = sums * (device.link_latency + device.kernel)
    if spent < saved:
        return None
    return (
        f"parallel.tp={tp} is likely slower than one GPU for this model: a decode step of few tokens saves about "
        f"{saved * 1e3:.2f} ms of reading weights and spends about {spent * 1e3:.2f} ms on {sums} sums "
        f"over the ranks. parallel.dp={tp} with tp=1 uses the same GPUs without them."
    )
