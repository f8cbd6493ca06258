"""Weight synchronisation: the decoder in training gives its weights to the one that generates, in another layout.

    push   copy what a rank has itself > rounds of messages for the rest > compare fingerprints of both sides

The layouts may differ in every number and share all, some or none of their ranks. The plan is made once. No rank ever
holds more than its own parameters and one bucket; with ZeRO stage 3, one bucket of parameters made whole besides.
"""

from __future__ import annotations

import hashlib
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.layout import Layout
from megalite.core.pipeline import transport_device
from megalite.core.progress import here
from megalite.hybrid.comparison import Comparison, Side, lowest
from megalite.hybrid.fingerprint import Fingerprinter, cover
from megalite.model.config import ModelConfig
from megalite.model.decoder import Decoder
from megalite.weights import lora_training
from megalite.weights.dtypes import WEIGHT_DTYPES, torch_dtype
from megalite.weights.reshard import Executor, Gathered, Round, RoundBuilder, Slot
from megalite.weights.reshard_plan import atoms, buckets, plan
from megalite.weights.table import Weights, expected, hf_shapes

Verify = Literal["always", "first", "off"]


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Seconds of the host that the last push took on this rank."""

    moving: float = 0.0
    verifying: float = 0.0


class Sync:
    """Moves weights from `source` to `target`; each is None on ranks outside its layout.

    `model`: whose weights are moved; where adapters train beside frozen ones, the adapters' table. `gathered` makes
    source parameters whole that are cut over dp; None if they always are. Collective: every rank of the run makes it
    and pushes alike. Where both layouts agree and one decoder serves both, or both have the same parameters, nothing is
    moved.
    """

    def __init__(
        self,
        model: Weights,
        source: Decoder | None,
        target: Decoder | None,
        source_layout: Layout,
        target_layout: Layout,
        *,
        bucket_bytes: int,
        verify: Verify = "always",
        gathered: Gathered | None = None,
    ):
        self.version = 0
        """Version of the weights in `target`; 0 before the first push."""
        self.last = Pushed()
        self.verify = verify
        self.rank = dist.get_rank() if dist.is_initialized() else source_layout.first_rank
        self._layouts = source_layout, target_layout
        self._source, self._target = _parameters(model, source), _parameters(model, target)
        self._gathered = gathered or (lambda names: nullcontext())
        params = (*self._target.values(), *self._source.values())
        self.device = params[0].device if params else torch.device("cpu")
        settings = model, source_layout, target_layout, bucket_bytes, verify
        self.dtype, self.is_shared = self._agree(settings)
        self._rounds: list[Round] = []
        if not self.is_shared:
            self._plan(model, bucket_bytes)

    def _agree(self, settings: tuple[object, ...]) -> tuple[torch.dtype, bool]:
        """The target's dtype, and whether its parameters are the source's, on every rank."""
        source, target = self._source, self._target
        dtypes = {param.dtype for param in target.values()}
        if len(dtypes) > 1:
            dtypes.discard(torch.float32)  # routers keep a vector in it
        assert len(dtypes) <= 1, f"the parameters of one decoder have the dtypes {dtypes}"
        known = [torch_dtype(name) for name in WEIGHT_DTYPES]
        code = known.index(dtypes.pop()) if dtypes else len(known)
        same = self._layouts[0] == self._layouts[1]
        shared = same and all(source[name].data_ptr() == param.data_ptr() for name, param in target.items())
        digest = int.from_bytes(hashlib.blake2b(repr(settings).encode(), digest_size=7).digest(), "little")
        agreed = lowest(torch.tensor([digest, -digest, code, int(shared)])).tolist()
        assert agreed[0] == -agreed[1], "the ranks were given different models, layouts or settings"
        assert code in (agreed[2], len(known)), "the generating ranks have different dtypes"
        return known[agreed[2]], bool(agreed[3])

    def _plan(self, model: Weights, bucket_bytes: int) -> None:
        source_layout, target_layout = self._layouts
        transfers = plan(model, source_layout, target_layout)
        builder = self._round_builder(model, bucket_bytes)
        local = [one for one in transfers if one.is_local]
        self._copies = builder.gathers(local, [Slot(one) for one in local if one.sender == self.rank])
        self._rounds = [builder.round(one) for one in buckets(transfers, bucket_bytes, self.dtype.itemsize)]
        self._executor = Executor(
            self.rank,
            self._source,
            self._target,
            self._gathered,
            dtype=self.dtype,
            device=self.device,
            transport=transport_device(dist.group.WORLD if dist.is_initialized() else None, self.device),
        )
        if self.verify != "off":
            self._comparison = self._compare(model, builder, bucket_bytes)

    def _round_builder(self, model: Weights, bucket_bytes: int) -> RoundBuilder:
        peers: tuple[int, ...] = ()
        sizes: dict[str, int] = {}
        layout = self._layouts[0]
        if self._source:
            peers = next(ranks for ranks in layout.groups("dp") if self.rank in ranks)
            item = next(iter(self._source.values())).element_size()
            held = expected(model, layout, self.rank)
            sizes = {name: item * sum(part.elements for part in parts) for name, (_, parts) in held.items()}
        return RoundBuilder(self.rank, peers, sizes, bucket_bytes)

    def _compare(self, model: Weights, builder: RoundBuilder, bucket_bytes: int) -> Comparison:
        cut = atoms(model, *self._layouts)
        source = cover(cut, lambda atom: atom.sources, self.rank)
        target = cover(cut, lambda atom: atom.targets, self.rank)
        batches = builder.fit(one.param for one in source)
        sides = (
            Side(self._source, source, batches, self._gathered),
            Side(self._target, target, [[one.param] for one in target], lambda names: nullcontext()),
        )
        largest = max(max(math.prod(shape[:-1]), shape[-1]) for shape in hf_shapes(model).values())
        make = Fingerprinter(self.device, self.dtype, largest=largest, limit_bytes=bucket_bytes)
        return Comparison(cut, *sides, make)

    @property
    def buffer_bytes(self) -> int:
        """Memory that a push takes on this rank while it moves weights, and gives back."""
        return max((one.sent + one.received for one in self._rounds), default=0) * self.dtype.itemsize

    @property
    def received_bytes(self) -> int:
        """What a push brings to this rank from others."""
        return sum(one.received for one in self._rounds) * self.dtype.itemsize

    @torch.no_grad()
    def push(self) -> int:
        """Bring the target's parameters up to date and return the version of its weights: 1, 2 and so on.

        They stay where they are in memory. MegaliteError on every rank if the sides differ afterwards.
        """
        self.version += 1
        here.step = ("weight sync", self.version)
        began = time.perf_counter()
        if not self.is_shared:
            self._executor.copy(self._copies)
            self._executor.exchange(self._rounds)
        moved = time.perf_counter()
        if not self.is_shared and (self.verify == "always" or (self.verify == "first" and self.version == 1)):
            self._comparison.check(self.version)
        self.last = Pushed(moving=moved - began, verifying=time.perf_counter() - moved)
        return self.version


def _parameters(model: Weights, decoder: Decoder | None) -> dict[str, Tensor]:
    if decoder is None:
        return {}
    if isinstance(model, ModelConfig):
        return dict(decoder.named_parameters(remove_duplicate=False))
    return lora_training.parameters(decoder)
