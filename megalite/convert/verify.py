"""Verification of weights: every range is made again and its digest compared.

By itself a folder of rank shards is held against its manifest and the weight table; `against` another checkpoint, in
any form and layout, every range is also made anew from there. Torch-free.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megalite.convert.convert import JOBS
from megalite.convert.output import SILENT, ByteProgress
from megalite.convert.quantize import SCALED, rounding_errors
from megalite.errors import CheckpointError, ConfigError, Problem
from megalite.model import families
from megalite.model.config import ModelConfig
from megalite.model.generation import GenerationConfig
from megalite.weights import manifest as manifests
from megalite.weights.checkpoint import Checkpoint, open_checkpoint
from megalite.weights.copying import OpenFiles, differing, digest_extent, in_parallel
from megalite.weights.folder import CONFIG
from megalite.weights.hf import resolve
from megalite.weights.identity import file_digest
from megalite.weights.manifest import Manifest, StoredFile
from megalite.weights.moves import Extent, Move, Part, plan
from megalite.weights.shards import file_extents, is_sharded
from megalite.weights.table import hf_shapes, pieces
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
    text: str | Path | None = None,
    jobs: int = JOBS,
    progress: ByteProgress = SILENT,
) -> Report:
    """Check a folder of rank shards or in Hugging Face layout, and compare it with another checkpoint.

    `text`: a file whose perplexity by both, on the CPU in float32, is noted too.

    What is wrong with `path` is in the report; CheckpointError is raised if `path` is no checkpoint at all, or for
    whatever is wrong with `against`.
    """
    words = None if text is None else _read(Path(text))
    folder = resolve(path)
    other = open_checkpoint(against) if against is not None else None
    check = _Check(Report(folder), jobs, progress)
    extents, model = check.shards() if is_sharded(folder) else check.hf(other is None)
    if other is not None and model is not None:
        check.compare(extents, model, other)
    check.report.findings.sort()
    if words is not None and other is not None and check.report.is_well:
        check.report.notes.append(f"perplexity of {text} {perplexities(folder, other.folder, words)}")
    return check.report


def _read(text: Path) -> str:
    """ConfigError: it can't be read."""
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(Problem(key="--text", rule=f"can't be read ({reason})", value=str(text))) from error


def perplexities(folder: Path, other: Path, text: str) -> str:
    """The perplexity of a text by two models, in words."""
    from megalite.convert.sample import perplexity

    (here, tokens), (there, _) = perplexity(folder, text), perplexity(other, text)
    return f"({tokens} tokens): {here:.4f}, of {other} {there:.4f} ({here / there - 1:+.2%})"


class _Check:
    """Collects findings from several threads."""

    def __init__(self, report: Report, jobs: int, progress: ByteProgress):
        self.report = report
        self.jobs = jobs
        self.progress = progress
        self._lock = threading.Lock()

    def wrong(self, finding: str) -> None:
        with self._lock:
            self.report.findings.append(finding)

    @contextmanager
    def _findings(self) -> Iterator[None]:
        """What is wrong with the folder, and ends what is within, is a finding."""
        try:
            yield
        except CheckpointError as error:
            self.wrong(str(error))

    # ---- rank shards ---------------------------------------------------------------------------------------------

    def shards(self) -> tuple[list[Extent], ModelConfig | None]:
        """Hold rank shards against their manifest; gives where the parts lie, as far as that is sound."""
        folder, extents = self.report.folder, []
        with self._findings():
            if not (folder / manifests.NAME).is_file():
                raise CheckpointError(f"{folder}: unfinished: it has no {manifests.NAME}, which is written last")
            manifest = manifests.read(folder)
            generation = GenerationConfig.read(folder, manifest.config)
            model = families.from_values(folder / CONFIG, manifest.config, generation)
            self._beside(manifest)
            for file in manifest.files.values():
                with self._findings():
                    extents += self._file(manifest, file, model)
                    self.report.files += 1
            self._replicas(extents)
            self._digests(extents)
            return extents, model if self.report.files == len(manifest.files) else None
        return extents, None

    def _beside(self, manifest: Manifest) -> None:
        """The other files of the folder."""
        for name, digest in manifest.copies.items():
            path = self.report.folder / name
            try:
                if file_digest(path) != digest:
                    self.wrong(f"{path}: not as it was when the shards were written")
            except OSError as error:
                self.wrong(f"{path}: can't be read: {error.strerror}")
        for path in sorted(self.report.folder.glob("*.safetensors")):
            if path.name not in manifest.files:
                self.wrong(f"{path}: not listed in {manifests.NAME}")

    def _file(self, manifest: Manifest, file: StoredFile, model: ModelConfig) -> list[Extent]:
        """The extents of a rank file, whose header must be sound."""
        path = self.report.folder / file.name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        header = _header(path)
        other = next((one.name for one in manifest.files.values() if one.header == header), file.name)
        if header != file.header and other != file.name:
            raise CheckpointError(f"{path}: is the file {other}; were files swapped?")
        extents = file_extents(self.report.folder, file, model, manifest.layout)
        if header != file.header:
            raise CheckpointError(f"{path}: its header is not as it was when it was written")
        return extents

    def _replicas(self, extents: list[Extent]) -> None:
        """Copies of a range must be equal."""
        first: dict[tuple[Part, int], Extent] = {}
        for extent in extents:
            other = first.setdefault((extent.part, extent.range.lo), extent)
            if (other.digest, other.info.dtype) != (extent.digest, extent.info.dtype):
                self.wrong(f"{_words(extent)}: differs from the copy in {other.file}")

    def _digests(self, extents: list[Extent]) -> None:
        self.progress.begin(sum(extent.nbytes for extent in extents))
        with OpenFiles() as files:

            def check(extent: Extent) -> None:
                with self._findings():
                    if digest_extent(files, extent) != extent.digest:
                        self.wrong(f"{_words(extent)}: its bytes are not those of the manifest")
                    self._checked(1, extent.nbytes)

            in_parallel(check, extents, self.jobs)

    def _checked(self, ranges: int, nbytes: int) -> None:
        with self._lock:
            self.report.ranges += ranges
            self.report.nbytes += nbytes
        self.progress.advance(nbytes)

    # ---- Hugging Face layout, and comparing ----------------------------------------------------------------------

    def hf(self, alone: bool) -> tuple[list[Extent], ModelConfig | None]:
        """Check the headers of a folder in Hugging Face layout, which has no digests of its own."""
        try:
            source = open_checkpoint(self.report.folder)
        except CheckpointError as error:
            if not (self.report.folder / CONFIG).exists():
                raise
            self.wrong(str(error))
            return [], None
        self.report.files = len(source.files)
        self.report.notes += source.notes
        if alone:
            self.report.notes.append("only headers were checked: a Hugging Face folder has no digests; use --against")
        return source.extents, source.model

    def compare(self, extents: list[Extent], model: ModelConfig, other: Checkpoint) -> None:
        """Make every range anew from another checkpoint and compare digests."""
        mine, theirs = hf_shapes(model), hf_shapes(other.model)
        if model.quantization is not None and other.model.quantization is None:
            codes = open_checkpoint(self.report.folder)
            was_scaled = bool(codes.values.get(SCALED))
            self._errors(codes, other, was_scaled)
            ends = ("first", "last")
            kept = {one.hf for one in pieces(model) if one.part is None and not (was_scaled and one.stage not in ends)}
            extents = [extent for extent in extents if extent.part[0] in kept]
        elif mine != theirs:
            name = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
            here, there = _shape(mine.get(name)), _shape(theirs.get(name))
            self.wrong(
                f"{self.report.folder}: not the same model as {other.folder}: {name} is {here} here and {there} there"
            )
            return
        known = {extent.part for extent in other.extents}
        moves = plan(other.extents, (extent for extent in extents if extent.part in known))
        changed = {(move.dtype, extent.info.dtype) for move in moves for extent in move.targets}
        if words := ", ".join(f"{theirs} there, {mine} here" for theirs, mine in sorted(changed) if theirs != mine):
            self.report.notes.append(f"compared after conversion: {words}")
        self.progress.begin(sum(move.nbytes for move in moves))
        with OpenFiles() as files:

            def check(move: Move) -> None:
                with self._findings():
                    for extent in differing(files, move):
                        self.wrong(f"{_words(extent)}: differs from {other.folder}")
                    self._checked(len(move.targets), move.nbytes)

            in_parallel(check, files.expecting(moves), self.jobs)

    def _errors(self, codes: Checkpoint, other: Checkpoint, was_scaled: bool) -> None:
        """Note how far the numbers that codes stand for are from another checkpoint's."""
        if was_scaled:
            rule = "layers were scaled by activations, so that their tensors can't be compared one by one; see --text"
            self.report.notes.append(rule)
            return
        for name, relative, largest in rounding_errors(codes, other):
            self.report.notes.append(f"{name}: rounding error {relative:.2%} of its norm, at most {largest:.3g}")


def _words(extent: Extent) -> str:
    return f"{extent.file}: {extent.info.name}: {extent.range}"


def _shape(shape: Iterable[int] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _header(path: Path) -> str:
    """The digest of all that comes before the tensors."""
    with open(path, "rb") as file:
        length = file.read(8)
        size = min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)
        return manifests.digest_of(length + file.read(size))
