"""The manifest of a folder of rank shards, manifest.json: written last, checked against every rule when it is read.

It lists, for every tensor of every rank file, dtype, shape and which ranges of which Hugging Face tensors it is made
of, each with a digest of its bytes as they lie in the file: xxh3_128, which finds accidents, not forgery. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import xxhash

from megalite import json_text
from megalite.core.layout import Layout
from megalite.errors import CheckpointError
from megalite.files import read_whole, write_durably
from megalite.weights.dtypes import STORAGE
from megalite.weights.tensor_file import is_plain_name

NAME = "manifest.json"
FORMAT = "megalite-shards"
VERSION = 1
MAX_BYTES = 512 << 20
MAX_RANKS = 1 << 16
WEIGHT = "weight"
"""The kind of file that holds the model; training adds kinds of its own, in the same ranges."""

_OF_THE_TEXT = ("format", "version", "digest")
"""Keys that say something of manifest.json itself."""
_TAIL = re.compile(rb'\n  "digest": "([0-9a-f]{32})"\n\}\n\Z')
"""The last line but one: the digest of all that comes before it."""


def _is_name(value: str) -> bool:
    return is_plain_name(value) and len(value) <= 1000


Name = Annotated[str, "has a name that is not plain", _is_name]
FilePath = Annotated[str, "has a name that is not plain", lambda value: all(map(_is_name, value.split("/")))]
Digest = Annotated[str, "must be a digest, 32 hexadecimal digits", re.compile("[0-9a-f]{32}").fullmatch]
Kind = Annotated[str, "is a damaged kind", re.compile("[a-z][a-z0-9_]{0,40}").fullmatch]
Count = Annotated[int, "must be a whole number", lambda value: 0 <= value <= 1 << 56]
Dtype = Annotated[str, f"must be one of {', '.join(STORAGE)}", STORAGE.__contains__]
"""Type, rule in words, and the rule: see `_reader`."""


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Elements lo..hi of a Hugging Face tensor along `dim`, and the digest of their bytes in the rank file."""

    hf: Name
    dim: Count
    lo: Count
    hi: Count
    digest: Digest


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A local parameter in a rank file: its ranges one after another."""

    dtype: Dtype
    shape: tuple[Count, ...]
    ranges: tuple[StoredRange, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One safetensors file of one rank."""

    rank: Count
    kind: Kind
    nbytes: Count
    header: Digest
    """Digest of the bytes before the tensors."""
    tensors: dict[Name, StoredTensor]

    @property
    def name(self) -> str:
        return file_name(self.rank, self.kind)

    @property
    def hf_names(self) -> set[str]:
        """The Hugging Face tensors of which it holds at least a part."""
        return {one.hf for tensor in self.tensors.values() for one in tensor.ranges}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a folder of rank shards without opening its weights."""

    layout: Layout
    """dp is 1: replicas share the files."""
    config: dict[str, Any]
    """The values of config.json."""
    bare: bool = False
    """The original's tensor names lack the family's prefix, and so will an export's."""
    left_out: tuple[Name, ...] = ()
    """Tensors of the original that are not weights of the model and were not kept."""
    made_from: str = ""
    """Fingerprint of the work that made the folder: source, layout, dtype."""
    training: dict[str, Any] = field(default_factory=dict)
    """What a training run notes beside its weights; empty for a model."""
    copies: dict[FilePath, Digest] = field(default_factory=dict)
    """Digests of the files beside the shards: config.json, tokenizer, generation settings."""
    files: dict[str, StoredFile]
    """Files by name, one for each rank and kind."""

    @property
    def kinds(self) -> list[str]:
        """The kinds of tensors stored for each parameter, weights first."""
        return sorted({file.kind for file in self.files.values()}, key=lambda kind: (kind != WEIGHT, kind))


_CONTAINERS = (dict, list, tuple, StoredFile, StoredTensor)


def file_name(rank: int, kind: str = WEIGHT) -> str:
    """`rank-003.safetensors` for the weights of rank 3, `exp_avg-003.safetensors` for what training adds."""
    return f"{'rank' if kind == WEIGHT else kind}-{rank:03d}.safetensors"


def digest_of(data: bytes | memoryview) -> str:
    """The digest of bytes in memory, of the kind that manifests hold."""
    return xxhash.xxh3_128_hexdigest(data)


# ---- writing -----------------------------------------------------------------------------------------------------


def write(folder: Path, manifest: Manifest) -> None:
    """Make the folder whole. Everything it lists must be on the disk by now."""
    write_durably(folder / NAME, encode(manifest))


def encode(manifest: Manifest) -> bytes:
    """The text of manifest.json: one line a range, so that two of them can be compared with diff."""
    layout: dict[str, Any] = {"tp": manifest.layout.tp, "pp": manifest.layout.pp}
    if manifest.layout.interleave > 1:
        layout["interleave"] = manifest.layout.interleave
    if manifest.layout.stages:
        layout["layers"] = list(manifest.layout.stages)
    values = {"format": FORMAT, "version": VERSION, **vars(manifest), "layout": layout}
    body = "{\n" + ",\n".join(f"  {_json(key)}: {_lines(value, '  ')}" for key, value in values.items()) + ","
    return f'{body}\n  "digest": "{digest_of(body.encode())}"\n}}\n'.encode()


def _fields(value: Any) -> dict[str, Any]:
    kind: Any = type(value)
    return {name: getattr(value, name) for name in _hints(kind)}


_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_fields).encode


def _lines(value: Any, indent: str) -> str:
    """JSON in which every container has a line of its own but the innermost, which share one with what they hold."""
    if is_dataclass(value):
        value = _fields(value)
    if isinstance(value, dict) and any(isinstance(one, _CONTAINERS) and one for one in value.values()):
        inner = [f"{indent}  {_json(key)}: {_lines(one, indent + '  ')}" for key, one in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | StoredRange) for one in value):
        return "[\n" + ",\n".join(f"{indent}  {_json(one)}" for one in value) + "]"
    return _json(value)


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
    except json_text.JsonError as error:
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
    try:
        return _manifest(values)
    except _Broken as error:
        raise CheckpointError(f"{path}: {error}") from error


class _Broken(Exception):
    """A rule, in words, that a value breaks; `path`: the keys that lead to the value, innermost first."""

    def __init__(self, rule: str):
        self.rule, self.path = rule, list[str]()

    def __str__(self) -> str:
        return f"{'.'.join(['it', *reversed(self.path)])[:200]} {self.rule}"

    def under(self, key: str) -> _Broken:
        self.path.append(key)
        return self


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What converts a JSON value to the type of a manifest's field, or raises _Broken: a function of the type, as a
    manifest has a hundred thousand values."""
    if kind is Any:
        return lambda value: value
    if kind is Layout:
        return _layout
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _checked(*arguments)
    if origin is tuple:
        each = _reader(arguments[0])
        return lambda value: tuple(map(each, _typed(list, value)))
    if origin is dict:
        return _mapped(*map(_reader, arguments))
    if is_dataclass(kind):
        return _built(kind)
    return lambda value: _typed(kind, value)


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise _Broken("is of the wrong type")
    return value


def _checked(base: type, rule: str, good: Callable[[Any], object]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is base and good(value):
            return value
        raise _Broken(rule)

    return read


def _mapped(key: Callable[[Any], Any], each: Callable[[Any], Any]) -> Callable[[Any], dict[Any, Any]]:
    def read(value: Any) -> dict[Any, Any]:
        made = {}
        for name, one in _typed(dict, value).items():
            key(name)
            try:
                made[name] = each(one)
            except _Broken as error:
                raise error.under(name) from None
        return made

    return read


def _built(kind: Any) -> Callable[[Any], Any]:
    readers = {name: _reader(each) for name, each in _hints(kind).items()}

    def read(value: Any) -> Any:
        if _typed(dict, value).keys() != readers.keys():
            raise _Broken(f"must have exactly {', '.join(readers)}")
        made = {}
        for name, each in readers.items():
            try:
                made[name] = each(value[name])
            except _Broken as error:
                raise error.under(name) from None
        return kind(**made)

    return read


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _layout(value: Any) -> Layout:
    stages: tuple[int, ...] = ()
    if isinstance(value, dict) and "layers" in value:
        value = dict(value)
        try:
            stages = _reader(tuple[int, ...])(value.pop("layers"))
        except _Broken as error:
            raise error.under("layers") from None
    sizes = _reader(dict[str, Annotated[int, f"must be a whole number from 1 to {MAX_RANKS}", _ranks]])(value)
    if not {"tp", "pp"} <= sizes.keys() <= {"tp", "pp", "interleave"} or sizes["tp"] * sizes["pp"] > MAX_RANKS:
        raise _Broken(f"must be tp and pp, of at most {MAX_RANKS} ranks")
    if sizes.get("interleave", 1) > 1 and sizes["pp"] == 1:
        raise _Broken("must be 1 where pp is 1").under("interleave")
    if stages and (len(stages) != sizes["pp"] or min(stages) < 1 or sizes.get("interleave", 1) > 1):
        raise _Broken("must be one number of layers for each stage").under("layers")
    return Layout(**sizes, stages=stages)


def _ranks(value: int) -> bool:
    return 1 <= value <= MAX_RANKS


def _manifest(values: dict[str, Any]) -> Manifest:
    manifest: Manifest = _reader(Manifest)({key: one for key, one in values.items() if key not in _OF_THE_TEXT})
    layout = manifest.layout
    expected = {file_name(rank, kind) for kind in {WEIGHT, *manifest.kinds} for rank in layout.ranks}
    misnamed = {name for name, file in manifest.files.items() if file.name != name}
    if wrong := sorted(misnamed | manifest.files.keys() ^ expected):
        raise _Broken(f"must list one file a rank of {layout.tp} x {layout.pp}; {wrong[0][:100]!r} is wrong").under(
            "files"
        )
    return manifest
