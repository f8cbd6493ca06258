"""Training state that survives a kill at any moment: rank shards of the float32 weights, with Adam's moments beside.

    FOLDER/step-00000500/rank-000.safetensors        weights, one file a tp rank
                         exp_avg-000.safetensors     the moments, in the same ranges
                         exp_avg_sq-000.safetensors
                         config.json tokenizer.json  ...
                         manifest.json               written last; a folder without one does not count

It is the format of `weights.shards`: a state can be run, converted to another tp and exported like any model. What it
holds does not depend on dp and the ZeRO stage, which may change between runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.core.layout import Layout
from megalite.errors import CheckpointError, maybe_fault
from megalite.files import DurableFile, sync_folder, write_durably
from megalite.train.export import as_bytes, gather_to_first
from megalite.train.trainer import Trainer
from megalite.train.zero import MOMENTS, WEIGHT, finish_setting, get_whole, set_whole
from megalite.weights import manifest as manifests
from megalite.weights import shards
from megalite.weights.manifest import Manifest, Range, StoredFile, StoredTensor, digest_of, file_name
from megalite.weights.mapping import Owned
from megalite.weights.tensor_file import TensorFiles, new_header

KINDS = (WEIGHT, *MOMENTS)
DIGEST_BYTES = 16
Held = dict[str, tuple[tuple[int, ...], list[Owned]]]
"""Shape of each parameter that a rank stores, and the ranges it is made of."""


def save_state(
    trainer: Trainer, folder: Path, training: Mapping[str, Any], config: dict[str, Any], copies: Mapping[str, bytes]
) -> None:
    """Save all that a resumed run needs as `folder/step-N` and remove older states.

    `training` goes into the manifest, beside the step; `config` is that of config.json, which is among `copies`: files
    by name. Collective. Killed at any moment, the newest complete state is the old or the new one.
    """
    state = trainer.state
    target = folder / f"step-{trainer.steps_done:08d}"
    layout = Layout(tp=state.layout.tp)
    ranges = [_num_ranges(trainer, layout, rank) for rank in layout.ranks]
    digests = []
    for kind in KINDS:
        mine = b"".join(_save_kind(trainer, kind, target))
        if state.dp.rank == 0:
            local = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
            digests.append(gather_to_first(local, [(count * DIGEST_BYTES,) for count in ranges], state.tp))
    if state.rank != state.layout.first_rank:
        return
    for name, content in copies.items():
        write_durably(target / name, content)
    manifest = Manifest(
        layout=layout,
        config=config,
        files={
            stored.name: stored
            for kind, parts in zip(KINDS, digests, strict=True)
            for rank, part in enumerate(parts)
            for stored in [_stored_file(trainer, layout, rank, kind, bytes(part.tolist()))]
        },
        copies={name: digest_of(content) for name, content in copies.items()},
        training={"step": trainer.steps_done, **training},
    )
    maybe_fault("state.manifest", state.rank)
    manifests.write(target, manifest)
    sync_folder(folder)
    maybe_fault("state.clean", state.rank)
    for other in folder.iterdir():
        if other != target:
            shutil.rmtree(other)


def _header(held: Held, tp: int, rank: int, kind: str) -> bytes:
    metadata = {"format": "pt", "layout": f"tp={tp},pp=1", "rank": str(rank), "kind": kind}
    entries = {name: ("F32", shape) for name, (shape, _) in held.items()}
    return new_header(Path(file_name(rank, kind)), entries, metadata)[0]


def _held(trainer: Trainer, layout: Layout, rank: int) -> Held:
    return shards.expected(trainer.decoder.config, layout, rank)


def _num_ranges(trainer: Trainer, layout: Layout, rank: int) -> int:
    return sum(len(parts) for _, parts in _held(trainer, layout, rank).values())


def _save_kind(trainer: Trainer, kind: str, target: Path) -> list[bytes]:
    """Write this tp rank's file, by its first replica; the digest of each range on the rank that writes."""
    state = trainer.state
    held = _held(trainer, Layout(tp=state.layout.tp), state.tp.rank)
    params = dict(trainer.decoder.named_parameters())
    digests: list[bytes] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, (_, parts) in held.items():
            value = get_whole(params[name], kind).cpu()  # collective over dp: every replica comes by here
            value = value * _stored_scale(trainer, name, kind, value.ndim)
            if state.dp.rank == 0:
                digests.extend(bytes.fromhex(digest) for digest in _digests(value, parts))
            yield name, value

    if state.dp.rank > 0:
        for _ in tensors():
            pass
        return []
    path = target / file_name(state.tp.rank, kind)
    with DurableFile(path) as file:
        file.write(_header(held, state.tp.size, state.tp.rank, kind))
        for _, value in tensors():
            file.write(as_bytes(value))
        maybe_fault("state.save", state.rank)
    return digests


def _stored_scale(trainer: Trainer, name: str, kind: str, ndim: int) -> Tensor | float:
    """Factor from a moment as it is trained to that of the true gradient, see `trainer.complete_gradients`."""
    holders = trainer.holders.get(name)
    if holders is None or kind == WEIGHT:
        return 1.0
    scale = holders.cpu().view(-1, *[1] * (ndim - 1))
    return scale.sqrt() if kind == "exp_avg" else scale


def _digests(value: Tensor, parts: list[Owned]) -> Iterator[str]:
    data = as_bytes(value)
    if len(parts) == 1:
        yield digest_of(data)
        return
    row = len(data) // value.shape[0]
    for part in parts:
        yield digest_of(data[part.start * row : (part.start + part.hi - part.lo) * row])


def _stored_file(trainer: Trainer, layout: Layout, rank: int, kind: str, digests: bytes) -> StoredFile:
    held = _held(trainer, layout, rank)
    left = iter(digests[at : at + DIGEST_BYTES].hex() for at in range(0, len(digests), DIGEST_BYTES))
    tensors = {
        name: StoredTensor(
            "F32", shape, tuple(Range(one.piece.hf, one.piece.hf_dim, one.lo, one.hi, next(left)) for one in parts)
        )
        for name, (shape, parts) in held.items()
    }
    start = _header(held, layout.tp, rank, kind)
    nbytes = len(start) + sum(4 * torch.Size(shape).numel() for shape, _ in held.values())
    return StoredFile(rank, kind, nbytes, digest_of(start), tensors)


# ---- going on --------------------------------------------------------------------------------------------------------


def newest_state(folder: Path, tp: int) -> tuple[Path, Manifest] | None:
    """The last complete state in `folder` and its manifest; of several of one step, the one that is cut for `tp`."""
    found = [
        (path, shards.open_manifest(path)) for path in sorted(folder.glob("step-*")) if (path / manifests.NAME).exists()
    ]
    if not found:
        return None
    path, manifest = max(found, key=lambda one: (_step(*one), one[1].layout.tp == tp))
    return path, manifest


def _step(path: Path, manifest: Manifest) -> int:
    step = manifest.training.get("step")
    if type(step) is not int or step < 0 or {*KINDS} - {*manifest.kinds}:
        raise CheckpointError(f"{path}: not a training state; to start from a model, set model.path to it")
    return step


def remove_unfinished(folder: Path) -> None:
    """Remove what saves that were killed have left. For one process, before any rank saves."""
    for path in folder.glob("step-*"):
        if not (path / manifests.NAME).exists():
            shutil.rmtree(path)


def load_state(trainer: Trainer, path: Path) -> None:
    """Continue from a saved state. Collective. CheckpointError if it is damaged, or of another tp or model."""
    state = trainer.state
    manifest = shards.check_layout(path, state.layout)
    step = _step(path, manifest)
    held = _held(trainer, manifest.layout, state.tp.rank)
    params = dict(trainer.decoder.named_parameters())
    for kind in KINDS:
        stored = manifest.files[file_name(state.tp.rank, kind)]
        infos = shards.check_file(path, stored, trainer.decoder.config, manifest.layout)
        with TensorFiles(infos) as files:
            for name, (_, parts) in held.items():
                value = files.read(name)
                if list(_digests(value, parts)) != [one.digest for one in stored.tensors[name].ranges]:
                    raise CheckpointError(
                        f"{path / stored.name}: {name} is damaged: its bytes are not those that were saved. "
                        f"Remove {path}, or copy it again."
                    )
                value = value.float() / _stored_scale(trainer, name, kind, value.ndim)
                set_whole(params[name], kind, value.to(trainer.device))
    finish_setting(trainer.optimizer, trainer.engine.optimizer, trainer.zero_stage, step)
    trainer.steps_done = step
