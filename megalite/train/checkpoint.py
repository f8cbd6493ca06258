"""Training state that survives a kill at any moment: rank shards of the float32 weights, with Adam's moments beside.

    FOLDER/step-00000500/rank-000.safetensors        weights, one file for each tp and pp rank
                         exp_avg-000.safetensors     the moments, in the same ranges
                         exp_avg_sq-000.safetensors
                         config.json tokenizer.json  ...
                         manifest.json               written last; a folder without one does not count

It is the format of `weights.shards`: a state can be run, cut for another layout and exported like any model, and a run
of any layout goes on from it. What it holds does not depend on dp and the ZeRO stage.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.collectives import all_reduce_sum
from megalite.core.layout import Layout, Whole, width
from megalite.core.parallel_state import ParallelState
from megalite.errors import CheckpointError, ConfigError, Problem, maybe_fault
from megalite.files import DurableFile, sync_folder
from megalite.model.config import ModelConfig
from megalite.train.export import as_bytes
from megalite.train.trainer import Trainer
from megalite.train.zero import MOMENTS, WEIGHT, finish_setting, get_whole, set_whole
from megalite.weights import manifest as manifests
from megalite.weights import shards
from megalite.weights import side_files as companions
from megalite.weights.folder import CONFIG, ModelFolder
from megalite.weights.manifest import Manifest, Range, StoredFile, StoredTensor, digest_of, file_name
from megalite.weights.shards import expected, stored_layout
from megalite.weights.side_files import Companions
from megalite.weights.table import Owned, pieces
from megalite.weights.tensor_file import DTYPE_BYTES, new_header
from megalite.weights.transfer import read_parameters

KINDS = (WEIGHT, *MOMENTS)
DTYPE = "float32"
"""Of the weights in a state."""
_NAME = re.compile(r"step-\d{8}(?:-([1-9]\d{0,8}))?")
"""Of what runs save."""
DIGEST_BYTES = 16
log = logging.getLogger(__name__)
Held = dict[str, tuple[tuple[int, ...], list[Owned]]]
"""Shape of each parameter that a rank stores, and the ranges it is made of."""


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_state(
    trainer: Trainer, folder: Path, training: Mapping[str, Any], base: ModelFolder, beside: Companions
) -> None:
    """Save all that a resumed run needs as `folder/step-N` and remove older states.

    `training` goes into the manifest, beside the step; `beside` are the `files_beside` of `base`. Collective; done on
    all ranks when it returns on one. Each tp and pp rank has its files, which different replicas write at the same
    time. Killed at any moment, the newest complete state is the old or the new one.
    """
    state, model = trainer.state, trainer.decoder.config
    layout = stored_layout(state.layout)
    wide = _wide_moments(model, layout)
    target = _new_folder(folder, trainer.steps_done)
    digests = _write_files(trainer, layout, wide, target)
    if state.rank == state.layout.first_rank:
        files = _collect(state, model, layout, wide, digests)
        config = companions.with_dtype(base.values, DTYPE)
        copies = companions.write({**beside, CONFIG: companions.as_json(config)}, target)
        manifest = Manifest(
            layout=layout,
            config=config,
            files=files,
            copies=copies,
            training={"step": trainer.steps_done, **training},
        )
        maybe_fault("state.manifest", state.rank)
        manifests.write(target, manifest)
        sync_folder(folder)
        maybe_fault("state.clean", state.rank)
        for other in _states(folder):
            if other != target:
                _remove(other)
    else:
        _send_digests(state, digests)
    all_reduce_sum(torch.zeros(1), state.world)  # everybody waits for the first rank


def _new_folder(folder: Path, step: int) -> Path:
    """Where to save: not over a whole state of the same step, which a kill would leave half overwritten.

    The same on every rank, because the manifest that is asked for is written only after all ranks have been here.
    """
    taken = max((_count(path) for path in folder.glob(f"step-{step:08d}*") if _is_whole(path)), default=0)
    return folder / (f"step-{step:08d}" if taken == 0 else f"step-{step:08d}-{taken + 1}")


def _states(folder: Path) -> list[Path]:
    """Folders of states: whole ones, whatever a tool called them, and what a killed run left. Others are not ours."""
    named = [path for path in sorted(folder.glob("step-*")) if path.is_dir()]
    return [path for path in named if _is_whole(path) or _NAME.fullmatch(path.name)]


def _remove(path: Path) -> None:
    """A state that is not needed any more. If it can't be removed, that is not worth ending a run for."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s: could not be removed: %s", path, error.strerror or error)


def _is_whole(path: Path) -> bool:
    return (path / manifests.NAME).exists()


def _count(path: Path) -> int:
    """Which save of its step a state is, from its name; 1 if that doesn't say so."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found and found[1] else 1


def _stored_rank(state: ParallelState) -> int:
    """The rank whose files hold what this rank holds."""
    return stored_layout(state.layout).rank(tp=state.tp.rank, pp=state.pp.rank)


def _writer(layout: Layout, rank: int, kind: str) -> int:
    """The rank of a run's `layout` that writes the file of a stored rank: the replicas share the kinds out."""
    place = stored_layout(layout).coord(rank)
    return layout.rank(tp=place.tp, pp=place.pp, dp=KINDS.index(kind) % layout.dp)


def _write_files(trainer: Trainer, layout: Layout, wide: set[str], target: Path) -> dict[str, bytes]:
    """Write this rank's share of the files; the digests of their ranges, end to end, by kind. Collective over dp."""
    state = trainer.state
    rank = _stored_rank(state)
    held = _held(trainer.decoder.config, layout, rank, wide)
    mine = [kind for kind in KINDS if _writer(state.layout, rank, kind) == state.rank]
    params = dict(trainer.decoder.named_parameters())
    digests: dict[str, list[bytes]] = {kind: [] for kind in mine}
    with ExitStack() as unfinished:
        ends = {kind: unfinished.enter_context(ExitStack()) for kind in mine}
        files: dict[str, BinaryIO] = {}
        for kind in mine:
            files[kind] = ends[kind].enter_context(DurableFile(target / file_name(rank, kind)))
            files[kind].write(_header(held, layout, wide, rank, kind))
        for name, (_, parts) in held.items():
            for kind in KINDS:
                value = get_whole(params[name], kind)  # every replica comes by here
                if kind in files:
                    value = _as_stored(trainer, name, kind, value.cpu())
                    files[kind].write(as_bytes(value))
                    digests[kind] += _digests(value, parts)
        for kind in mine:
            maybe_fault("state.save", state.rank)
            ends[kind].close()
    return {kind: b"".join(parts) for kind, parts in digests.items()}


def _digests(value: Tensor, parts: list[Owned]) -> Iterator[bytes]:
    """Of each range that a parameter is made of."""
    data = as_bytes(value)
    row = len(data) // value.shape[0]
    for part in parts:
        rows = data[part.start * row : (part.start + part.hi - part.lo) * row]
        yield bytes.fromhex(digest_of(rows if len(parts) > 1 else data))


def _send_digests(state: ParallelState, digests: dict[str, bytes]) -> None:
    """Tell the first rank what this one has written, which says at the same time that it is on the disk."""
    for mine in digests.values():
        dist.send(
            torch.frombuffer(bytearray(mine), dtype=torch.uint8), state.layout.first_rank, group=state.world.group
        )


def _collect(
    state: ParallelState, model: ModelConfig, layout: Layout, wide: set[str], digests: dict[str, bytes]
) -> dict[str, StoredFile]:
    """On the first rank what the manifest says of the files, once every rank has written its own."""
    files = {}
    for rank in layout.ranks:
        held = _held(model, layout, rank, wide)
        for kind in KINDS:
            writer = _writer(state.layout, rank, kind)
            found = digests.get(kind, b"")
            if writer != state.rank:
                buffer = torch.empty(DIGEST_BYTES * sum(len(parts) for _, parts in held.values()), dtype=torch.uint8)
                dist.recv(buffer, writer, group=state.world.group)
                found = buffer.numpy().tobytes()
            files[file_name(rank, kind)] = _stored_file(held, layout, wide, rank, kind, found)
    return files


# ---- what a file holds -----------------------------------------------------------------------------------------------


def _moment_scale(trainer: Trainer, name: str, kind: str, ndim: int) -> Tensor | None:
    """Factor from a moment as it is trained to that of the true gradient, see `trainer.complete_gradients`.

    It depends on the layout, so what is stored is without it. None: there is none.
    """
    holders = trainer.holders.get(name)
    if holders is None or kind == WEIGHT:
        return None
    scale = holders.to("cpu", torch.float64).view(-1, *[1] * (ndim - 1))
    return scale.sqrt() if kind == "exp_avg" else scale


def _as_stored(trainer: Trainer, name: str, kind: str, value: Tensor) -> Tensor:
    scale = _moment_scale(trainer, name, kind, value.ndim)
    return value if scale is None else value * scale


def _as_trained(trainer: Trainer, name: str, kind: str, value: Tensor) -> Tensor:
    scale = _moment_scale(trainer, name, kind, value.ndim)
    return (value if scale is None else value / scale).float()


def _wide_moments(model: ModelConfig, layout: Layout) -> set[str]:
    """The parameters whose moments are scaled, and stored in float64: they come back bit for bit."""
    tp = layout.tp
    return {
        piece.param
        for piece in pieces(model)
        if not isinstance(piece.split, Whole)
        and sum(width(piece.split, tp, rank) for rank in range(tp)) > piece.split.total
    }


def _held(model: ModelConfig, layout: Layout, rank: int, wide: set[str]) -> Held:
    """What a rank stores, in the order of its files: there the wide ones come first."""
    return dict(sorted(expected(model, layout, rank).items(), key=lambda item: item[0] not in wide))


def _dtype(name: str, kind: str, wide: set[str]) -> str:
    return "F64" if kind != WEIGHT and name in wide else "F32"


def _header(held: Held, layout: Layout, wide: set[str], rank: int, kind: str) -> bytes:
    entries = {name: (_dtype(name, kind, wide), shape) for name, (shape, _) in held.items()}
    return new_header(Path(file_name(rank, kind)), entries, shards.metadata(layout, rank, kind))[0]


def _stored_file(held: Held, layout: Layout, wide: set[str], rank: int, kind: str, digests: bytes) -> StoredFile:
    left = iter(digests[at : at + DIGEST_BYTES].hex() for at in range(0, len(digests), DIGEST_BYTES))
    tensors = {
        name: StoredTensor(
            _dtype(name, kind, wide),
            shape,
            tuple(Range(one.piece.hf, one.piece.hf_dim, one.lo, one.hi, next(left)) for one in parts),
        )
        for name, (shape, parts) in held.items()
    }
    start = _header(held, layout, wide, rank, kind)
    sizes = (DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in tensors.values())
    return StoredFile(rank, kind, len(start) + sum(sizes), digest_of(start), tensors)


# ---- going on --------------------------------------------------------------------------------------------------------


def newest_state(folder: Path) -> tuple[Path, Manifest] | None:
    """The last complete state in `folder`, of whatever layout, and its manifest."""
    found = [(path, shards.open_manifest(path)) for path in _states(folder) if _is_whole(path)]
    return max(found, key=lambda one: (_step(*one), _count(one[0])), default=None)


def state_to_resume(folder: Path, *, resume: bool) -> tuple[Path, Manifest] | None:
    """The newest state, if there is one. ConfigError if there is and `resume` (`output.resume`) forbids to go on."""
    found = newest_state(folder)
    if found is not None and not resume:
        fix = "Set output.resume=true to go on with it, or choose another folder."
        raise ConfigError(Problem(key="output.folder", rule=f"already holds a training run: {found[0]}", fix=fix))
    return found


def check_same_model(manifest: Manifest, base: ModelFolder) -> None:
    """ConfigError if a state is of another model than the one that training began with."""
    config = companions.with_dtype(base.values, DTYPE)
    keys = sorted(config.keys() | manifest.config.keys())
    changed = [key for key in keys if config.get(key) != manifest.config.get(key)]
    if changed:
        rule = f"is not the model that the run began with: {', '.join(changed)}"
        fix = "Set it back, or choose another output.folder."
        raise ConfigError(Problem(key="model.config", rule=rule, fix=fix))


def _step(path: Path, manifest: Manifest) -> int:
    step = manifest.training.get("step")
    if type(step) is not int or step < 0 or {*KINDS} - {*manifest.kinds}:
        raise CheckpointError(f"{path}: not a training state; to start from a model, set model.path to it")
    return step


def remove_unfinished(folder: Path) -> None:
    """Remove what saves that were killed have left. For one process, before any rank saves."""
    for path in _states(folder):
        if not _is_whole(path):
            _remove(path)


def load_state(trainer: Trainer, path: Path) -> None:
    """Continue from a state that was saved in any layout. Collective. CheckpointError if it is damaged.

    Every rank reads what it needs by itself, see `read_parameters`; one parameter is in memory at a time. In the layout
    of the saved run weights and moments are then what they were, bit for bit.
    """
    state = trainer.state
    manifest = shards.open_manifest(path)
    step = _step(path, manifest)
    params = dict(trainer.decoder.named_parameters())
    for kind in KINDS:
        for name, value in read_parameters(path, trainer.decoder.config, state.layout, state.rank, kind):
            set_whole(params[name], kind, _as_trained(trainer, name, kind, value).to(trainer.device))
    finish_setting(trainer.optimizer, trainer.engine.optimizer, trainer.zero_stage, step)
    trainer.steps_done = step
