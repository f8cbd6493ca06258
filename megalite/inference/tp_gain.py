"""Whether cutting a small model over GPUs can pay at all: an estimate from bytes and latencies. Torch-free.

A decode step of few tokens lasts as long as its weights are read. tp ranks read them tp times as fast, and sum what
they computed twice a layer.
"""

from __future__ import annotations

READ_RATE = 3.1e12
"""Bytes a second at which a GPU reads its memory: measured on an H100."""
SUM_SECONDS = 8e-6
"""Of a sum of one row over two GPUs that NVLink connects, in a CUDA graph: 7 to 8 us measured on two H100."""
NCCL_SUM_SECONDS = 15e-6
"""The same through NCCL."""
SUMS_A_LAYER = 2


def tp_warning(*, tp: int, rank_weight_bytes: int, layers: int, symmetric: bool = True) -> str | None:
    """Why generation with this tp is likely slower than on one GPU; None if it is not.

    `rank_weight_bytes`: of one rank of a stage with `layers` layers. `symmetric`: the sums do without NCCL.
    """
    if tp == 1:
        return None
    saved = (tp - 1) * rank_weight_bytes / READ_RATE
    sums = SUMS_A_LAYER * layers
    spent = sums * (SUM_SECONDS if symmetric else NCCL_SUM_SECONDS)
    if spent < saved:
        return None
    return (
        f"parallel.tp={tp} is likely slower than one GPU for this model: a decode step of few tokens saves about "
        f"{saved * 1e3:.2f} ms of reading weights and spends about {spent * 1e3:.2f} ms on {sums} sums "
        f"over the ranks. parallel.dp={tp} with tp=1 uses the same GPUs without them."
    )
