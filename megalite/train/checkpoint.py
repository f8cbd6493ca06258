"""Training state that survives a kill at any moment: rank shards of the float32 weights, with Adam's moments beside.

    FOLDER/step-00000500/rank-000.safetensors        weights, one file for each tp and pp rank
                         exp_avg-000.safetensors     the moments, in the same ranges
                         exp_avg_sq-000.safetensors
                         config.json tokenizer.json  ...
                         manifest.json               written last; a folder without one does not count

Where adapters train beside a frozen model, a state holds these alone; adapter_config.json is there in place of
config.json, and the manifest says where the model was and by which digest it is known.

It is the format of `weights.shards`: a state can be run, cut for another layout and exported like any model, and a run
of any layout goes on from it. What it holds does not depend on dp and the ZeRO stage.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.collectives import all_reduce_sum
from megalite.core.layout import Layout
from megalite.core.progress import here
from megalite.errors import CheckpointError, ConfigError, Problem, maybe_fault
from megalite.files import DurableFile, as_json, lock_at_once, sync_folder, told_clearly
from megalite.model.config import ModelConfig
from megalite.train.export import as_bytes
from megalite.train.gradients import is_shared
from megalite.train.trainer import Trainer
from megalite.train.zero import MOMENTS, WEIGHT, finish_setting, get_whole, set_whole
from megalite.weights import manifest as manifests
from megalite.weights import shards, side_files
from megalite.weights.folder import CONFIG, ModelFolder
from megalite.weights.manifest import Manifest, StoredFile, digest_of, file_name
from megalite.weights.moves import Extent
from megalite.weights.shards import rank_extents, rank_header, stored_file, stored_layout
from megalite.weights.side_files import SideFiles
from megalite.weights.table import expected, pieces
from megalite.weights.transfer import read_parameters

KINDS = (WEIGHT, *MOMENTS)
DTYPE = "float32"
"""Dtype of the weights in a state."""
_NAME = re.compile(r"step-\d{8}(?:-([1-9]\d{0,8}))?")
"""Name of a state's folder; the last number counts the saves of one step, from the second on."""
DIGEST_BYTES = 16
CLAIM = Path("training/.lock")
"""Locked in an output folder while a run writes there."""
log = logging.getLogger(__name__)


# ---- whose folder it is ----------------------------------------------------------------------------------------------


def claim(folder: Path, *, patience: float) -> BinaryIO:
    """Keep other runs out of an output folder, until what this gives is closed or this process ends.

    ConfigError: another run is still there after `patience` seconds; one that was killed takes a moment to be gone.
    """
    path = folder / CLAIM
    with told_clearly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    give_up = time.monotonic() + patience
    while not lock_at_once(file):
        if time.monotonic() >= give_up:
            file.close()
            fix = "Wait for it, or choose another folder."
            raise ConfigError(
                Problem(key="output.folder", rule="another run is writing it", value=str(folder), fix=fix)
            )
        time.sleep(0.05)
    return file


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_state(
    trainer: Trainer, folder: Path, training: Mapping[str, Any], base: ModelFolder, beside: SideFiles
) -> None:
    """Save all that a resumed run needs as `folder/step-N` and remove older states.

    `training` goes into the manifest, beside the step; `beside` are the `files_beside` of `base`. Collective; done on
    all ranks when it returns on one. Each tp and pp rank has its files, which different replicas write at the same
    time. Killed at any moment, the newest complete state is the old or the new one.
    """
    here.step = ("the checkpoint of step", trainer.steps_done)
    state = trainer.state
    layout = stored_layout(state.layout)
    target = _new_folder(folder, trainer.steps_done)
    digests = _write_files(trainer, layout, target)
    if state.rank == state.layout.first_rank:
        files = _collect_files(trainer, layout, digests)
        config = side_files.with_dtype(base.values, DTYPE)
        model = {CONFIG: as_json(config).encode()} if isinstance(trainer.table, ModelConfig) else {}
        copies = side_files.write({**beside, **model}, target)
        noted = {"step": trainer.steps_done, **training}
        maybe_fault("state.manifest", state.rank)
        manifests.write(target, Manifest(layout=layout, config=config, files=files, copies=copies, training=noted))
        sync_folder(folder)
        maybe_fault("state.clean", state.rank)
        for other in _states(folder):
            if other != target:
                _remove(other)
    else:
        for mine in digests.values():  # this says at the same time that the file is on the disk
            with here.track("digests", (state.rank, state.layout.first_rank), flow=True).entering("send"):
                dist.send(torch.frombuffer(mine, dtype=torch.uint8), state.layout.first_rank, group=state.world.group)
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
    """Remove a state that is not needed any more; if that fails, the run goes on."""
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


def _writer(layout: Layout, rank: int, kind: str) -> int:
    """The rank of a run's `layout` that writes the file of a stored rank: the replicas share the kinds out."""
    place = stored_layout(layout).coord(rank)
    return layout.rank(tp=place.tp, pp=place.pp, dp=KINDS.index(kind) % layout.dp)


def _write_files(trainer: Trainer, layout: Layout, target: Path) -> dict[str, bytearray]:
    """Write this rank's share of the files; the digests of their ranges, end to end, by kind. Collective over dp."""
    state = trainer.state
    rank = layout.rank(tp=state.tp.rank, pp=state.pp.rank)
    mine = [kind for kind in KINDS if _writer(state.layout, rank, kind) == state.rank]
    params = dict(trainer.decoder.named_parameters())
    digests = {kind: bytearray() for kind in mine}
    files: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        for kind in reversed(mine):  # they are closed in the order of the kinds
            files[kind] = stack.enter_context(DurableFile(target / file_name(rank, kind)))
            stack.callback(maybe_fault, "state.save", state.rank)
            files[kind].write(_rank_file(trainer, layout, rank, kind)[0])
        extents = _rank_file(trainer, layout, rank, WEIGHT)[1]
        for name, parts in groupby((extent.range for extent in extents), key=lambda one: one.piece.param):
            ranges = list(parts)
            for kind in KINDS:
                value = get_whole(params[name], kind)  # every replica comes by here
                if kind in files:
                    value = _rescaled(trainer, name, kind, value.cpu(), stored=True)
                    files[kind].write(as_bytes(value))
                    for one in ranges:
                        values = value.narrow(one.dim, one.start, one.count)
                        digests[kind] += bytes.fromhex(digest_of(as_bytes(values)))
    return digests


def _collect_files(trainer: Trainer, layout: Layout, digests: Mapping[str, bytearray]) -> dict[str, StoredFile]:
    """The manifest's entries of all files, on the first rank, once every rank has written its own."""
    state = trainer.state
    files = {}
    for rank in layout.ranks:
        for kind in KINDS:
            header, extents = _rank_file(trainer, layout, rank, kind)
            writer = _writer(state.layout, rank, kind)
            found = digests.get(kind) if writer == state.rank else None
            if found is None:
                found = bytearray(DIGEST_BYTES * len(extents))
                with here.track("digests", (writer, state.rank), flow=True).entering("receive"):
                    dist.recv(torch.frombuffer(found, dtype=torch.uint8), writer, group=state.world.group)
            digests_of = (found[at : at + DIGEST_BYTES].hex() for at in range(0, len(found), DIGEST_BYTES))
            told = [replace(extent, digest=digest) for extent, digest in zip(extents, digests_of, strict=True)]
            files[file_name(rank, kind)] = stored_file(header, rank, kind, told)
    return files


# ---- what a file holds -----------------------------------------------------------------------------------------------


def _rescaled(trainer: Trainer, name: str, kind: str, value: Tensor, *, stored: bool) -> Tensor:
    """A moment without the factor on its gradient that this layout has, see `PartialGradients`; or with it again.

    It is stored in float64, so it comes back bit for bit.
    """
    holders = trainer.holders.get(name)
    if holders is None or kind == WEIGHT:
        return value
    scale = holders.to("cpu", torch.float64).view(-1, *[1] * (value.ndim - 1))
    scale = scale.sqrt() if kind == "exp_avg" else scale
    return value * scale if stored else (value / scale).float()


def _rank_file(trainer: Trainer, layout: Layout, rank: int, kind: str) -> tuple[bytes, list[Extent]]:
    """The header of a rank's file and the ranges in it, in their order: those of what may be float64 come first."""
    model = trainer.table
    scaled = {piece.param for piece in pieces(model) if is_shared(piece.split, layout.tp)}
    held = sorted(expected(model, layout, rank).items(), key=lambda item: item[0] not in scaled)
    entries = {name: ("F64" if kind != WEIGHT and name in scaled else "F32", shape) for name, (shape, _) in held}
    header, tensors = rank_header(Path(file_name(rank, kind)), entries, layout, rank, kind)
    return header, sorted(rank_extents(model, layout, rank, tensors, kind), key=lambda extent: extent.offset)


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
    config = side_files.with_dtype(base.values, DTYPE)
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


def load_state(trainer: Trainer, path: Path, manifest: Manifest) -> None:
    """Continue from a state that was saved in any layout, and its manifest. Collective. CheckpointError if it is
    damaged.

    Every rank reads what it needs by itself, see `read_parameters`; one parameter is in memory at a time. In the layout
    of the saved run weights and moments are then what they were, bit for bit.
    """
    state = trainer.state
    step = _step(path, manifest)
    params = dict(trainer.decoder.named_parameters())
    for kind in KINDS:
        for name, value in read_parameters(path, trainer.table, state.layout, state.rank, kind, manifest):
            value = _rescaled(trainer, name, kind, value, stored=False).float()
            set_whole(params[name], kind, value.to(trainer.device))
    finish_setting(trainer.optimizer, trainer.engine.optimizer, trainer.zero_stage, step)
    trainer.steps_done = step
