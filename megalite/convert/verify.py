"""Proves that weights are what they should be: every range is derived again and its digest compared.

By itself a folder of rank shards is held against its manifest and the weight table; `against` another checkpoint, in
any form and layout, every range is also made anew from there. Importable without torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megalite.convert.convert import Begin, default_jobs
from megalite.convert.output import Progress
from megalite.errors import CheckpointError
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.generation import GenerationConfig
from megalite.weights import manifest as manifests
from megalite.weights.blocks import Block, Blocks, Move, merged, plan
from megalite.weights.copying import Reading, digest_block, in_parallel, perform
from megalite.weights.hf import inside, resolve
from megalite.weights.manifest import Manifest, StoredFile
from megalite.weights.shards import check_file, is_sharded
from megalite.weights.side_files import CONFIG, digest_of_file
from megalite.weights.sources import Source, file_blocks, open_source
from megalite.weights.table import hf_shapes
from megalite.weights.tensor_file import MAX_HEADER_BYTES


@dataclass
class Report:
    """What was found."""

    folder: Path
    findings: list[str] = field(default_factory=list)
    """What is wrong, one line each; empty if all is well."""
    notes: list[str] = field(default_factory=list)
    files: int = 0
    ranges: int = 0
    """Ranges whose digests were compared."""
    nbytes: int = 0

    @property
    def is_well(self) -> bool:
        return not self.findings


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    jobs: int | None = None,
    begin: Begin = lambda total: None,
    progress: Progress = lambda count: None,
) -> Report:
    """Check a folder of rank shards or in Hugging Face layout, and compare it with another checkpoint.

    What is wrong with `path` is in the report; CheckpointError is raised if `path` is no checkpoint at all, or for
    whatever is wrong with `against`.
    """
    folder = resolve(path)
    other = open_source(against) if against is not None else None
    check = _Check(Report(folder), jobs or default_jobs(), begin, progress)
    if is_sharded(folder):
        blocks, model = check.shards()
    else:
        blocks, model = check.hf(other is None)
    if other is not None and model is not None:
        check.compare(blocks, model, other)
    check.report.findings.sort()
    return check.report


class _Check:
    """Collects findings from several threads."""

    def __init__(self, report: Report, jobs: int, begin: Begin, progress: Progress):
        self.report = report
        self.jobs = jobs
        self.begin = begin
        self.progress = progress
        self._lock = threading.Lock()

    def wrong(self, finding: str) -> None:
        with self._lock:
            self.report.findings.append(finding)

    # ---- rank shards ---------------------------------------------------------------------------------------------

    def shards(self) -> tuple[Blocks, ModelConfig | None]:
        """Hold rank shards against their manifest; gives where the parts lie, as far as that is sound."""
        folder = self.report.folder
        try:
            if not (folder / manifests.NAME).is_file():
                raise CheckpointError(f"{folder}: unfinished: it has no {manifests.NAME}, which is written last")
            manifest = manifests.read(folder)
            generation = GenerationConfig.read(folder, manifest.config)
            model = families.from_values(folder / CONFIG, manifest.config, generation)
        except CheckpointError as error:
            self.wrong(str(error))
            return {}, None
        self._copies(manifest)
        self._strays(manifest)
        sound = []
        for file in manifest.files.values():
            blocks = self._file(manifest, file, model)
            if blocks is not None:
                sound.append(blocks)
                self.report.files += 1
        blocks = merged(sound)
        self._replicas(blocks)
        every = [block for mine in blocks.values() for block in mine]
        self._digests(every)
        whole = len(sound) == len(manifest.files)
        return blocks, model if whole else None

    def _copies(self, manifest: Manifest) -> None:
        for name, digest in manifest.copies.items():
            path = self.report.folder / name
            try:
                inside(self.report.folder, name)
                if digest_of_file(path) != digest:
                    self.wrong(f"{path}: not as it was when the shards were written")
            except OSError as error:
                self.wrong(f"{path}: can't be read: {error.strerror}")
            except CheckpointError as error:
                self.wrong(str(error))

    def _strays(self, manifest: Manifest) -> None:
        for path in sorted(self.report.folder.glob("*.safetensors")):
            if path.name not in manifest.files:
                self.wrong(f"{path}: not listed in {manifests.NAME}")

    def _file(self, manifest: Manifest, file: StoredFile, model: ModelConfig) -> Blocks | None:
        """The blocks of a rank file whose header is sound."""
        folder = self.report.folder
        path = folder / file.name
        try:
            if not path.is_file():
                raise CheckpointError(f"{path}: missing")
            inside(folder, file.name)
            header = _header(path)
            if header != file.header:
                other = next((one.name for one in manifest.files.values() if one.header == header), None)
                if other is not None:
                    raise CheckpointError(f"{path}: is the file {other}; were files swapped?")
                check_file(folder, file, model, manifest.layout)
                raise CheckpointError(f"{path}: its header is not as it was when it was written")
            return file_blocks(folder, file, model, manifest.layout)[1]
        except CheckpointError as error:
            self.wrong(str(error))
            return None

    def _replicas(self, blocks: Blocks) -> None:
        """Copies of a range must be equal."""
        for mine in blocks.values():
            first: dict[tuple[int, int, int, int], Block] = {}
            for block in mine:
                other = first.setdefault(block.region, block)
                if (other.digest, other.dtype) != (block.digest, block.dtype):
                    self.wrong(f"{block.file}: {block.tensor}: {block.range}: differs from the copy in {other.file}")

    def _digests(self, blocks: list[Block]) -> None:
        self.begin(sum(block.nbytes for block in blocks))
        with Reading() as files:

            def check(block: Block) -> None:
                try:
                    found = digest_block(files, block)
                except CheckpointError as error:
                    self.wrong(str(error))
                    return
                if found != block.digest:
                    self.wrong(f"{block.file}: {block.tensor}: {block.range}: its bytes are not those of the manifest")
                self._checked(1, block.nbytes)

            in_parallel(check, blocks, self.jobs)

    def _checked(self, ranges: int, nbytes: int) -> None:
        with self._lock:
            self.report.ranges += ranges
            self.report.nbytes += nbytes
        self.progress(nbytes)

    # ---- Hugging Face layout, and comparing ----------------------------------------------------------------------

    def hf(self, alone: bool) -> tuple[Blocks, ModelConfig | None]:
        """Check the headers of a folder in Hugging Face layout, which has no digests of its own."""
        try:
            source = open_source(self.report.folder)
        except CheckpointError as error:
            if not (self.report.folder / "config.json").exists():
                raise
            self.wrong(str(error))
            return {}, None
        self.report.files = len(source.files)
        self.report.notes += source.notes
        if alone:
            self.report.notes.append("only headers were checked: a Hugging Face folder has no digests; use --against")
        return source.blocks, source.model

    def compare(self, blocks: Blocks, model: ModelConfig, other: Source) -> None:
        """Make every range anew from another checkpoint and compare digests."""
        mine, theirs = hf_shapes(model), hf_shapes(other.model)
        if mine != theirs:
            name = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
            self.wrong(
                f"{self.report.folder}: not the same model as {other.folder}: {name} is {_shape(mine.get(name))} here "
                f"and {_shape(theirs.get(name))} there"
            )
            return
        wanted = {part: blocks[part] for part in blocks if part in other.blocks}
        moves = plan(other.blocks, wanted)
        changed = sorted({(move.dtype, block.dtype) for move in moves for block in move.targets} - _EQUAL)
        if changed:
            words = ", ".join(f"{theirs} there, {mine} here" for theirs, mine in changed)
            self.report.notes.append(f"compared after conversion: {words}")
        self.begin(sum(move.nbytes for move in moves))
        with Reading() as files:

            def check(move: Move) -> None:
                try:
                    digests = perform(files, move, lambda block, row, rows: None)
                except CheckpointError as error:
                    self.wrong(str(error))
                    return
                for block, digest in zip(move.targets, digests, strict=True):
                    if digest != (block.digest or digest_block(files, block)):
                        self.wrong(f"{block.file}: {block.tensor}: {block.range}: differs from {other.folder}")
                self._checked(len(move.targets), move.nbytes)

            in_parallel(check, files.expecting(moves), self.jobs)


_EQUAL = {(dtype, dtype) for dtype in ("F64", "F32", "F16", "BF16")}


def _shape(shape: Iterable[int] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _header(path: Path) -> str:
    """The digest of all that comes before the tensors."""
    with open(path, "rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)
        return manifests.digest_of(length + file.read(size))
