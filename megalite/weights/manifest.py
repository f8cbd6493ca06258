"""What a folder of rank shards says of itself: manifest.json, written last, believed only after every rule is checked.

It lists, for every tensor of every rank file, dtype, shape and which ranges of which Hugging Face tensors it is made
of, each with a digest of its bytes as they lie in the file: xxh3_128, which finds accidents, not forgery. Importable
without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megalite import json_text
from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.files import read_whole, write_durably
from megalite.weights.tensor_file import WEIGHT_DTYPES, is_plain_name

NAME = "manifest.json"
FORMAT = "megalite-shards"
VERSION = 1
MAX_BYTES = 512 << 20
MAX_RANKS = 1 << 16
WEIGHT = "weight"
"""The kind of file that holds the model; training adds kinds of its own, in the same ranges."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,40}")
_TAIL = re.compile(rb'\n  "digest": "([0-9a-f]{32})"\n\}\n\Z')
"""The last line but one: the digest of all that comes before it."""


@dataclass(frozen=True, slots=True)
class Range:
    """Elements lo..hi of a Hugging Face tensor along `dim`, and the digest of their bytes in the rank file."""

    hf: str
    dim: int
    lo: int
    hi: int
    digest: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A local parameter in a rank file: its ranges one after another."""

    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One safetensors file of one rank."""

    rank: int
    kind: str
    nbytes: int
    header: str
    """Digest of the bytes before the tensors."""
    tensors: dict[str, StoredTensor]

    @property
    def name(self) -> str:
        return file_name(self.rank, self.kind)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a folder of rank shards without opening its weights."""

    layout: Layout
    """dp is 1: replicas share the files."""
    config: dict[str, Any]
    """The values of config.json."""
    files: dict[str, StoredFile]
    """By name: one for each rank and kind."""
    copies: dict[str, str] = field(default_factory=dict)
    """Digests of the files beside the shards: config.json, tokenizer, generation settings."""
    bare: bool = False
    """The original's tensor names lack the family's prefix, and so will an export's."""
    left_out: tuple[str, ...] = ()
    """Tensors of the original that are not weights of the model and were not kept."""
    made_from: str = ""
    """Fingerprint of the work that made the folder: source, layout, dtype."""
    training: dict[str, Any] = field(default_factory=dict)
    """What a training run notes beside its weights; empty for a model."""

    @property
    def kinds(self) -> list[str]:
        """What is stored of each parameter, the weights first."""
        return sorted({file.kind for file in self.files.values()}, key=lambda kind: (kind != WEIGHT, kind))


def file_name(rank: int, kind: str = WEIGHT) -> str:
    """`rank-003.safetensors` for the weights of rank 3, `exp_avg-003.safetensors` for what training adds."""
    return f"{'rank' if kind == WEIGHT else kind}-{rank:03d}.safetensors"


def digest_of(data: bytes | memoryview) -> str:
    """The digest that manifests hold, of bytes that are in memory."""
    return xxhash.xxh3_128_hexdigest(data)


# ---- writing -----------------------------------------------------------------------------------------------------


def write(folder: Path, manifest: Manifest) -> None:
    """Make the folder whole. Everything it lists must be on the disk by now."""
    write_durably(folder / NAME, encode(manifest))


def encode(manifest: Manifest) -> bytes:
    """The text of manifest.json: one line a range, so that two of them can be compared with diff."""
    layout = {"tp": manifest.layout.tp, "pp": manifest.layout.pp}
    if manifest.layout.interleave > 1:
        layout["interleave"] = manifest.layout.interleave
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION, "layout": layout, "config": manifest.config}
    head |= {"bare": manifest.bare, "left_out": list(manifest.left_out), "made_from": manifest.made_from}
    head |= {"training": manifest.training, "copies": manifest.copies}
    lines = [f"  {_json(key)}: {_json(value)}," for key, value in head.items()]
    lines.append('  "files": {')
    lines.append(",\n".join(_file_text(name, file) for name, file in manifest.files.items()))
    lines.append("  },")
    body = ("{\n" + "\n".join(lines)).encode()
    return body + f'\n  "digest": "{digest_of(body)}"\n}}\n'.encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _file_text(name: str, file: StoredFile) -> str:
    head = {"rank": file.rank, "kind": file.kind, "nbytes": file.nbytes, "header": file.header}
    tensors = ",\n".join(_tensor_text(key, tensor) for key, tensor in file.tensors.items())
    return f'    {_json(name)}: {_json(head)[:-1]}, "tensors": {{\n{tensors}\n    }}}}'


def _tensor_text(name: str, tensor: StoredTensor) -> str:
    head = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    ranges = ",\n".join(f"        {_json(asdict(one))}" for one in tensor.ranges)
    return f'      {_json(name)}: {_json(head)[:-1]}, "ranges": [\n{ranges}]}}'


# ---- reading -----------------------------------------------------------------------------------------------------


def read(folder: Path) -> Manifest:
    """The manifest of a folder of rank shards.

    CheckpointError, saying why, if it is missing, damaged, of another version or breaks a rule; nothing it says is
    held against the weight files yet.
    """
    path = folder / NAME
    try:
        return decode(read_whole(path, MAX_BYTES), path)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def decode(content: bytes, path: Path) -> Manifest:
    """As `read`, of bytes; `path` is for messages."""
    try:
        values = json_text.parse(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of rank shards")
    if values.get("version") != VERSION:
        got = str(values.get("version"))[:20]
        raise CheckpointError(f"{path}: format version {got}; this megalite reads version {VERSION}")
    tail = _TAIL.search(content[-64:])
    body = content[: -len(tail.group())] if tail else b""
    if tail is None or digest_of(body).encode() != tail.group(1):
        raise CheckpointError(f"{path}: damaged, or changed after it was written: its digest does not match")
    return _Reader(path).manifest(values)


class _Reader:
    """Takes values apart, believing nothing; every message names the file and the key."""

    def __init__(self, path: Path):
        self.path = path

    def problem(self, where: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {where[:200]} {rule}")

    def keys(self, values: Any, where: str, *keys: str) -> dict[str, Any]:
        if not isinstance(values, dict) or values.keys() != set(keys):
            raise self.problem(where, f"must have exactly {', '.join(keys)}")
        return values

    def count(self, value: Any, where: str, low: int = 0, high: int = 1 << 56) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.problem(where, f"must be a whole number from {low} to {high}")
        return value

    def digest(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            raise self.problem(where, "must be a digest, 32 hexadecimal digits")
        return value

    def name(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not is_plain_name(value) or len(value) > 1000:
            raise self.problem(where, f"has a name that is not plain: {str(value)[:100]!r}")
        return value

    def path_name(self, value: str) -> str:
        """The name of a file beside the weights, or its path in a subfolder."""
        for part in value.split("/"):
            self.name(part, "copies")
        return value

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.problem(where, "must be an object")
        return value

    def manifest(self, values: Any) -> Manifest:
        head = ("format", "version", "layout", "config", "bare", "left_out", "made_from", "training", "copies")
        values = self.keys(values, "it", *head, "files", "digest")
        self.digest(values["digest"], "digest")
        layout = self.layout(values["layout"])
        if type(values["bare"]) is not bool or not isinstance(values["made_from"], str):
            raise self.problem("bare or made_from", "is of the wrong type")
        if not isinstance(values["left_out"], list):
            raise self.problem("left_out", "must be a list")
        copies = self.mapping(values["copies"], "copies")
        manifest = Manifest(
            layout=layout,
            config=dict(self.mapping(values["config"], "config")),
            files={name: self.file(name, file) for name, file in self.mapping(values["files"], "files").items()},
            copies={self.path_name(key): self.digest(value, f"copies.{key}") for key, value in copies.items()},
            bare=values["bare"],
            left_out=tuple(self.name(name, "left_out") for name in values["left_out"]),
            made_from=values["made_from"],
            training=dict(self.mapping(values["training"], "training")),
        )
        expected = {file_name(rank, kind) for kind in {WEIGHT, *manifest.kinds} for rank in manifest.layout.ranks}
        if manifest.files.keys() != expected:
            wrong = sorted(manifest.files.keys() ^ expected)[0]
            places = f"{layout.tp} x {layout.pp}"
            raise self.problem("files", f"must list one file a rank of {places}; {wrong[:100]!r} is too few or many")
        return manifest

    def layout(self, values: Any) -> Layout:
        keys = ("tp", "pp", "interleave") if isinstance(values, dict) and "interleave" in values else ("tp", "pp")
        sizes = self.keys(values, "layout", *keys)
        sizes = {key: self.count(sizes[key], f"layout.{key}", 1, MAX_RANKS) for key in keys}
        if sizes["tp"] * sizes["pp"] > MAX_RANKS:
            raise self.problem("layout", f"must have at most {MAX_RANKS} ranks")
        if sizes.get("interleave", 1) > 1 and sizes["pp"] == 1:
            raise self.problem("layout.interleave", "must be 1 where pp is 1")
        return Layout(**sizes)

    def file(self, name: str, values: Any) -> StoredFile:
        where = f"files.{name}"
        values = self.keys(values, where, "rank", "kind", "nbytes", "header", "tensors")
        if not isinstance(values["kind"], str) or not _KIND.fullmatch(values["kind"]):
            raise self.problem(where, "has a damaged kind")
        file = StoredFile(
            self.count(values["rank"], f"{where}.rank", 0, MAX_RANKS),
            values["kind"],
            self.count(values["nbytes"], f"{where}.nbytes"),
            self.digest(values["header"], f"{where}.header"),
            {
                self.name(key, where): self.tensor(tensor, f"{where}: {key}")
                for key, tensor in self.mapping(values["tensors"], where).items()
            },
        )
        if file.name != name:
            raise self.problem(where, f"must be named {file.name}")
        return file

    def tensor(self, values: Any, where: str) -> StoredTensor:
        values = self.keys(values, where, "dtype", "shape", "ranges")
        if not isinstance(values["dtype"], str) or values["dtype"] not in WEIGHT_DTYPES:
            raise self.problem(where, f"has a dtype that is none of {', '.join(WEIGHT_DTYPES)}")
        if not isinstance(values["shape"], list) or not 1 <= len(values["shape"]) <= 16:
            raise self.problem(where, "has a damaged shape")
        if not isinstance(values["ranges"], list):
            raise self.problem(where, "has no list of ranges")
        shape = tuple(self.count(size, f"{where}: shape", 0, 1 << 48) for size in values["shape"])
        return StoredTensor(values["dtype"], shape, tuple(self.range(one, where) for one in values["ranges"]))

    def range(self, values: Any, where: str) -> Range:
        values = self.keys(values, f"{where}: a range", "hf", "dim", "lo", "hi", "digest")
        hf = self.name(values["hf"], where)
        dim = self.count(values["dim"], f"{where}: dim", 0, 15)
        lo = self.count(values["lo"], f"{where}: lo", 0, 1 << 48)
        return Range(
            hf, dim, lo, self.count(values["hi"], f"{where}: hi", lo, 1 << 48), self.digest(values["digest"], where)
        )
