"""A model in Hugging Face layout, in a folder or on the hub: which tensors it has, and where they lie.

`resolve` turns a folder or a hub id (`owner/name`) into a folder; `read_headers` checks the headers of all its weight
files. Only safetensors are read: other formats can hold code and are refused with the way to convert them. Torch-free.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megalite.config.typecheck import gguf_advice
from megalite.config.validate import model_location
from megalite.errors import CheckpointError
from megalite.model.config import ModelConfig
from megalite.model.families import WeightNames, weight_names
from megalite.model.hf_config import read_json
from megalite.weights.dtypes import STORAGE, WEIGHT_DTYPES
from megalite.weights.table import hf_shapes, pieces
from megalite.weights.tensor_file import TensorInfo, read_header, stored_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
"""The only subfolder of a model that decides what it does."""
CONFIG_PATTERNS = ["*.json", "*.jinja"]
"""What of a hub repository is needed besides weights: config, generation config, tokenizer.json, chat templates."""
WEIGHT_PATTERNS = ["*.safetensors"]
SECOND_COPY = "consolidated*"
"""Mistral's second copy of the weights."""
CODE = ("*.py", "*.pyc", "*.so")
"""Never downloaded, copied or run."""
COMPARED_ROWS = 64
HUB_TIMEOUT = 5.0
"""Seconds the hub has to answer before a cached copy is used instead."""

OTHER_FORMATS = {
    ".bin": "PyTorch pickles",
    ".pt": "PyTorch pickles",
    ".pth": "PyTorch pickles",
    ".ckpt": "PyTorch pickles",
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".onnx_data": "ONNX",
}

log = logging.getLogger(__name__)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, in whatever format, or lists those that do."""
    return Path(name).suffix in {".safetensors", ".part", *OTHER_FORMATS} or name.endswith(".index.json")


@dataclass(frozen=True)
class HFWeights:
    """The tensors of a model folder, by their full names; nothing but headers is read."""

    tensors: dict[str, TensorInfo]
    bare: bool = False
    """Its files hold the bare model, whose names lack the family's prefix."""


def read_headers(folder: Path, names: WeightNames | None = None) -> HFWeights:
    """The weights of a model folder. CheckpointError names the file that is missing, damaged or refused.

    With `names`, what the model's tensors are called, they are found as transformers finds them: those of the bare
    model, saved without the family's prefix, get their full names, an embedding that is stored only as the head it
    is tied to gets its own, and stacked tensors are those that they are made of.
    """
    if names is None:
        return HFWeights(_read_files(folder, None))
    embedding, head = names.embedding, names.tied_head
    tensors = _read_files(folder, may_be_absent=head)
    if names.renamed and not any(name.startswith(names.prefix) for name in tensors):
        tensors = {_renamed(name, names.renamed): info for name, info in tensors.items()}
    tensors = {whole: info for name, info in tensors.items() for whole in _with_ends(name, names.ends)}
    bare = not any(name.startswith(names.prefix) for name in tensors)
    if bare:
        tensors = {name if name.startswith("lm_head.") else names.prefix + name: info for name, info in tensors.items()}
    if head in tensors:
        if embedding in tensors:
            _check_tied(tensors[embedding], tensors[head])
        else:
            tensors[embedding] = tensors.pop(head)
    return HFWeights(dict(_unstacked(tensors, names.stacked)), bare)


def read_weights(folder: Path, model: ModelConfig) -> HFWeights:
    """The weights of a folder, once they are known to be the model's: `read_headers`, `check_names`,
    `check_constants`. CheckpointError: they are not."""
    names = weight_names(model)
    weights = read_headers(folder, names)
    check_names(model, weights.tensors, str(folder))
    check_constants(names, weights.tensors)
    parts = {piece.hf: piece.part for piece in pieces(model)}
    for name, part in parts.items():
        info, known = weights.tensors[name], part.dtypes if part else WEIGHT_DTYPES
        if info.dtype not in known:
            raise CheckpointError(f"{info.file}: tensor {info.name} is {info.dtype}; it must be {', '.join(known)}")
    return weights


def _unstacked(
    tensors: Mapping[str, TensorInfo], stacked: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, TensorInfo]]:
    """Each expert's tensors in place of those of all experts, in whose bytes they lie one after the other."""
    for name, info in tensors.items():
        end = next((end for end in stacked if name.endswith(end)), None)
        if end is None or len(info.shape) != 3 or info.shape[1] % len(stacked[end]) or not info.nbytes:
            yield name, info
            continue
        experts, rows, columns = info.shape
        parts, shape = stacked[end], (rows // len(stacked[end]), columns)
        nbytes = info.nbytes // (experts * len(parts))
        for index, (expert, part) in enumerate(product(range(experts), parts)):
            whole = name.removesuffix(end) + part.format(expert=expert)
            yield whole, replace(info, shape=shape, offset=info.offset + index * nbytes, nbytes=nbytes)


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    begins = next((begin for begin in beginnings if name.startswith(begin)), None)
    return name if begins is None else beginnings[begins] + name.removeprefix(begins)


def _with_ends(name: str, ends: Mapping[str, tuple[str, ...]]) -> list[str]:
    end = next((end for end in ends if name.endswith(end)), None)
    return [name] if end is None else [name.removesuffix(end) + one for one in ends[end]]


def _check_tied(embedding: TensorInfo, head: TensorInfo) -> None:
    """CheckpointError if a head that config.json calls tied is stored beside the embedding and is another matrix.

    Rows all over both are compared: heads that were trained apart differ everywhere.
    """
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape) or _some_rows(embedding) != _some_rows(head):
        raise CheckpointError(
            f"{head.file}: {head.name} is not {embedding.name}, though config.json ties them. If they are two, "
            "set tie_word_embeddings to false in config.json, else remove one."
        )


def _some_rows(info: TensorInfo) -> list[bytes]:
    count = info.shape[0] if info.shape else 1
    nbytes = info.nbytes // max(1, count)
    with open(info.file, "rb") as file:
        rows = range(0, count, max(1, count // COMPARED_ROWS))
        return [os.pread(file.fileno(), nbytes, info.offset + row * nbytes) for row in rows]


def _read_files(folder: Path, may_be_absent: str | None) -> dict[str, TensorInfo]:
    """Tensors of all weight files, by name. `may_be_absent`: one that an index may list although no file has it."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() or single.is_symlink():
        return read_header(single)
    if not index.exists():
        raise _no_weights(folder)
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of the {len(shards)} weight files that {INDEX} names are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Was the download interrupted? "
            "Download the model again."
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"{info.file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name == may_be_absent and name not in tensors:
            continue
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{index}: tensor {name} is not in {shard}, where the index says it is")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", shard) or ".." in shard:
            raise CheckpointError(f"{index}: {str(shard)[:100]!r} is not the plain name of a safetensors file")
    return weight_map


def check_names(config: ModelConfig, tensors: Mapping[str, TensorInfo | None], where: str) -> None:
    """CheckpointError unless the tensors are exactly the model's, in the shapes the config implies.

    Tensors that a family is known to store without using (rotary frequencies, masks) are passed over; all else counts.
    A tensor that is None has a shape that is not known yet.
    """
    expected = hf_shapes(config)
    ignored = [re.compile(pattern) for pattern in weight_names(config).ignored]
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(name for name in tensors.keys() - expected.keys() if not any(p.search(name) for p in ignored))
    wrong = [
        f"{name} is {list(info.shape)}, config.json implies {list(shape)}"
        for name, shape in expected.items()
        if (info := tensors.get(name)) is not None and (info.shape or (1,)) != shape
    ]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (("missing tensors", missing), ("unknown tensors", unknown), ("wrong shapes", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: the weights do not fit config.json; " + "; ".join(problems))


def check_constants(names: WeightNames, tensors: Mapping[str, TensorInfo]) -> None:
    """CheckpointError if the files have another value for a number that the model's code has as a constant."""
    for pattern, wanted in names.constants.items():
        for name, info in tensors.items():
            if re.search(pattern, name) is None:
                continue
            if info.dtype not in STORAGE or not info.nbytes:
                raise CheckpointError(f"{info.file}: {name} must be numbers")
            import numpy as np  # and not at the top: every job's check of its config reads headers, few have constants

            from megalite.weights.rounding import to_float

            found = to_float(np.frombuffer(stored_bytes(info), STORAGE[info.dtype]), info.dtype)
            wrong = found[~np.isclose(found, wanted, rtol=1e-2, atol=0)]
            if wrong.size:
                raise CheckpointError(f"{info.file}: {name} is {wrong[0]:g}; only {wanted:g} is supported")


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _no_weights(folder: Path) -> CheckpointError:
    """What to say of a folder that has neither model.safetensors nor its index."""
    names = sorted(item.name for item in folder.iterdir())
    stray = [name for name in names if name.endswith(".safetensors")]
    if stray:
        return CheckpointError(f"{folder}: has {stray[0]} but neither {SINGLE} nor {INDEX}. Download the index too.")
    for name in names:
        kind = OTHER_FORMATS.get(Path(name).suffix)
        if kind == "GGUF":
            return CheckpointError(f"{folder / name}: {gguf_advice(folder, name)}")
        if kind == "ONNX":
            continue
        if kind and name not in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
            return CheckpointError(
                f"{folder / name}: {kind} can run code when read, so they are refused. If you trust it, convert it: "
                f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
                ".save_pretrained('NEW_FOLDER')\""
            )
    return CheckpointError(f"{folder}: has no weights ({SINGLE}, or {INDEX} and its files)")


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True, beside: bool = False) -> Path:
    """The local folder of a model: the path itself, or the cached snapshot of a hub id, downloaded if need be.

    `weights=False` fetches only the configuration and tokenizer; `beside` all that goes along with weights, see
    `side_files`. With HF_HUB_OFFLINE=1, or when the hub does not answer, a complete cached snapshot is used.
    CheckpointError if there is none.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file() and local.suffix == ".gguf":
        raise CheckpointError(f"{path}: {gguf_advice(local.parent, local.name)}")
    if local.is_file():
        raise CheckpointError(f"{path}: a model is a folder, this is a file")
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", str(path)) or local.parent.is_dir():
        raise CheckpointError(f"{path}: no such model folder (a model of the hub is written owner/name)")
    wanted = ["*"] if beside else [*CONFIG_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    unwanted = [SECOND_COPY, *(_all_but_weights(weights) if beside else _other_folders(TEMPLATES))]
    return Path(_snapshot(str(path), revision, wanted, unwanted))


def at_hand(path: str | Path, revision: str | None = None) -> Path | None:
    """The folder of a model that is on this disk already, of a hub id its snapshot in the cache; nobody is asked."""
    if Path(path).is_dir():
        return Path(path)
    if model_location(str(path)) != "hub":
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(path), "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _all_but_weights(weights: bool) -> Iterator[str]:
    """Patterns of files that are not part of a model: other formats of its weights, code, hidden files."""
    yield from (*CODE, ".*", "*/.*", "*/*.safetensors")
    yield from (f"*{suffix}" for suffix in OTHER_FORMATS)
    if not weights:
        yield "*.safetensors"


def _other_folders(name: str) -> Iterator[str]:
    """Patterns that together match every path in a folder but those in `name`; in patterns `*` crosses folders."""
    for length in range(len(name)):
        yield f"{name[:length]}/*"
        yield f"{name[:length]}[!{name[length]}/]*/*"
    yield f"{name}[!/]*/*"


def _snapshot(repo: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> str:
    from huggingface_hub import snapshot_download

    unreachable = _probe(repo, revision)
    try:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
            local_files_only=unreachable is not None,
            library_name="megalite",
        )
    except Exception as error:  # the HTTP library's errors are not part of huggingface_hub's interface
        if unreachable is None:
            raise CheckpointError(
                f"{repo}: the download failed: {_first_line(error)}. Run it again to go on."
            ) from error
        partial = "only part of it is in the cache" if "incomplete" in str(error) else "it is not in the cache"
        raise CheckpointError(
            f"{repo}: no such folder, the hub can't be asked for it ({_first_line(unreachable)}) and {partial}. "
            "Check the name and the network, or download it elsewhere and give the folder."
        ) from error


def _probe(repo: str, revision: str | None) -> Exception | None:
    """Ask the hub for the model once: None if it answers, the reason if it can't be asked.

    CheckpointError if it answers that there is no such model or revision, or that this user may not have it.
    huggingface_hub's own first request has no time limit and its later ones are repeated for minutes.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT)
    except OfflineModeIsEnabled as error:
        return error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo}: its owner must grant access. Ask for it on its page, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: neither a folder here nor a model of the hub that you may read. If it is private, log in with "
            "`hf auth login`."
        ) from error
    except Exception as error:  # see _snapshot: no answer, whatever the reason
        log.warning("%s: the hub can't be asked (%s); looking in the cache", repo, _first_line(error))
        return error
    files = [file.rfilename for file in info.siblings or ()]
    quantized = min((name for name in files if name.endswith(".gguf")), default=None)
    if quantized is not None and not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{repo}: has only GGUF files. {gguf_advice(repo, quantized)}")
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
