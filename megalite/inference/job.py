"""The inference job: prompts in, results out, over every rank of the run. `launch/infer.py` runs it."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from megalite.config.load import DEFAULT, Loaded
from megalite.config.schema import InferConfig
from megalite.core.agreement import broadcast_bytes
from megalite.core.collectives import gather_reports
from megalite.errors import EXIT_DONE, EXIT_PROMPTS_FAILED
from megalite.inference.engine import Hooks
from megalite.inference.io.job_input import InputBatch, read_inputs
from megalite.inference.io.output_file import OutputFile, fingerprint
from megalite.inference.io.printing import Printer, StreamPrinter
from megalite.inference.outputs import RequestOutput, TokenDelta
from megalite.inference.replica import Replica, as_sampled, load_replica
from megalite.inference.run import Ranks, agree_on_end, make_feed, prompt_limits
from megalite.inference.tp_gain import tp_warning
from megalite.kernels.device import device_name
from megalite.monitor.progress import ProgressBar
from megalite.monitor.report import format_report
from megalite.monitor.words import format_bytes, format_count, wrapped
from megalite.planner.devices import planned_as
from megalite.preflight import given
from megalite.run import runtime as distributed
from megalite.run import tracing
from megalite.run.runtime import Runtime
from megalite.weights.folder import ModelFolder

FAILURES_SHOWN = 10
"""Prompts that can't run, listed on standard error; the result of each says why."""
MAIL_INTERVAL = 0.05
"""Seconds between looks into the mailbox."""
_MAIL = "results"
_END = b"end"
"""A replica's last letter."""


def run(loaded: Loaded[InferConfig]) -> int:
    """Generate for the whole input; every rank calls it. Errors leave by exception, see run/runtime.py.

    The exit code says whether there are prompts that could not run.
    """
    config = loaded.config
    beside = f"{config.output.file}.status.json" if config.output.file else None
    with distributed.start(
        config.distributed,
        given(loaded),
        status_file=config.monitor.status_file or beside,
    ) as runtime:
        failed = _generate(loaded, runtime)
    return EXIT_PROMPTS_FAILED if failed else EXIT_DONE


def _generate(loaded: Loaded[InferConfig], runtime: Runtime) -> int:
    """How many prompts could not run; the same on every rank."""
    replica, folder = load_replica(loaded.config, runtime)
    loaded = as_sampled(loaded, folder)
    config = loaded.config
    ranks = Ranks(replica.state, "input.prompts" if config.input.file is None else "input.file")
    stdin = _stdin(config, runtime)
    batch = read_inputs(config.input, config.sampling, prompt_limits(replica), stdin=stdin, ranks=ranks)
    writer_rank = replica.layout.rank(tp=0, pp=replica.layout.pp - 1, dp=0)
    with ExitStack() as stack:
        writer = None
        if runtime.rank == writer_rank:
            writer = stack.enter_context(Writer(config, replica, weights_identity(folder.path), batch))
        done = broadcast_bytes(json.dumps(sorted(writer.finished)).encode() if writer else None, writer_rank)
        left = batch.without(json.loads(done))
        sequences = sum(request.num_samples for request in left.requests) or 1
        engine = replica.engine(
            longest=max((request.longest for request in left.requests), default=1), sequences=sequences
        )
        engine.warm_up(sequences)
        gc.freeze()  # what was imported and built stays; collections in the middle of the run need not look at it
        if writer:
            _announce(loaded, folder, replica)
            writer.go_on(left)
        mail = Mailbox(replica)
        hooks = Hooks(
            on_output=writer.write if writer else mail.post,
            on_deltas=lambda deltas: writer.stream(deltas) if writer else None,
            on_step=lambda tokens: writer.step(tokens, mail) if writer else None,
            stop_requested=lambda: runtime.signal_received() is not None or (writer or mail).reader_has_left,
        )
        # Only the control rank, which is the writer's, asks which requests are streamed.
        requests = [replace(one, stream=True) for one in left.requests] if writer and writer.streams else left.requests
        with tracing.measured(config.monitor, runtime, replica.state, shows=writer is not None):
            completed = engine.run(make_feed(replica, requests, _MAIL + "/next"), hooks)
        mail.finish(writer)
        reports = gather_reports(replica.report(engine, failed=len(left.failures) if writer else 0))
        agree_on_end(replica, completed)
    if writer and config.monitor.report and (left.requests or left.failures):
        print(format_report(reports), file=sys.stderr)
    if writer and writer.cut and loaded.origins.get("sampling.max_tokens") == DEFAULT:
        hint = f"{format_count(writer.cut, 'prompt')} had output that ended at sampling.max_tokens = "
        print(wrapped(f"hint: {hint}{config.sampling.max_tokens}, the default; set it to allow more."), file=sys.stderr)
    return len(left.failures)


def _stdin(config: InferConfig, runtime: Runtime) -> BytesIO | None:
    """Standard input belongs to rank 0, which gives it to the others."""
    if config.input.file != "-":
        return None
    return BytesIO(broadcast_bytes(sys.stdin.buffer.read() if runtime.rank == 0 else None, 0))


def _announce(loaded: Loaded[InferConfig], folder: ModelFolder, replica: Replica) -> None:
    """Print what was decided for the user."""
    own = replica.model.max_position_embeddings
    why = "as asked" if replica.settings.max_model_len else "the model's own"
    if not replica.settings.max_model_len and replica.max_model_len < own:
        why = f"the largest that fits; the model's own is {own}"
    block = replica.settings.block_size
    dtype = str(replica.dtype).removeprefix("torch.")
    told = [
        f"{loaded.config.model.path}: {replica.model.family}, {dtype} on {replica.device.type}, {replica.layout}",
        f"max_model_len {replica.max_model_len} ({why}); {format_count(replica.num_blocks, 'KV block')} of {block} "
        f"tokens, {format_bytes(replica.kv_bytes)} a rank",
    ]
    theirs = [
        key for key in folder.generation.sampling if loaded.origins[f"sampling.{key}"] == str(folder.generation.path)
    ]
    if theirs:
        values = ", ".join(f"{key} {getattr(loaded.config.sampling, key):g}" for key in theirs)
        told.append(f"sampling: {values}, as the model's {folder.generation.path.name} says")
    if replica.device.type != "cpu":
        layers = len(replica.decoder.layer_range)
        gpu = planned_as(device_name(replica.device))
        warning = tp_warning(gpu, tp=replica.layout.tp, rank_weight_bytes=replica.weight_bytes, layers=layers)
        told += [f"warning: {warning}"] if warning else []
    print("\n".join(map(wrapped, told)), file=sys.stderr)


class Writer:
    """Takes the results of all replicas to the output file or the terminal. Lives on one rank."""

    def __init__(self, config: InferConfig, replica: Replica, weights: str, batch: InputBatch):
        """`weights`: identifies the model's weights, see `weights_identity`."""
        self.file = None
        if config.output.file:
            decided = fingerprint(config, weights=weights, inputs=batch.digest)
            self.file = OutputFile.open(config.output.file, decided, batch.order, overwrite=config.output.overwrite)
        self.finished = self.file.finished if self.file else frozenset()
        """Ids that an earlier run has finished; prompts that failed there are tried again."""
        self.printer: Printer | StreamPrinter | None = None
        is_one = len(batch.order) == len(batch.requests) == 1 and batch.requests[0].num_samples == 1
        self.streams = self.file is None and sys.stdout.isatty() and is_one
        """The completion is shown as it grows, and no bar is in its way."""
        shown = config.monitor.progress and not self.streams and not config.monitor.live
        self.progress = ProgressBar(len(batch.order), done=len(self.finished), enabled=shown)
        if self.streams:
            self.printer = StreamPrinter(batch.requests[0])
        elif self.file is None:
            self.printer = Printer(batch.order, self.progress)
        self.max_tokens = config.sampling.max_tokens
        self.cut = 0
        """Prompts of this run with output that ended at `max_tokens`."""
        self._dp = replica.layout.dp
        self._last_look = 0.0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.close()
        for sink in (self.file, self.printer):
            if sink is not None:
                sink.close()

    def go_on(self, batch: InputBatch) -> None:
        """Say what an earlier run has left to do, and write the prompts that can't run."""
        if self.file and self.finished:
            done, total = len(self.finished), len(self.file.known)
            rest = "; nothing is left to do" if done == total else ""
            line = f"{self.file.path.name}: {done:,} of {total:,} prompts are done already{rest}"
            print(wrapped(line), file=sys.stderr)
        for failure in batch.failures[:FAILURES_SHOWN]:
            print(f"error: {failure.error}", file=sys.stderr)
        if len(batch.failures) > FAILURES_SHOWN:
            print(
                f"error: and {len(batch.failures) - FAILURES_SHOWN:,} more; each one's result says why", file=sys.stderr
            )
        for failure in batch.failures:
            self.write(failure)

    def stream(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            assert isinstance(self.printer, StreamPrinter)
            self.printer.stream(delta)

    def write(self, output: RequestOutput) -> None:
        ends = {(one.finish_reason, len(one.token_ids)) for one in output.outputs}
        self.cut += ("length", self.max_tokens) in ends
        for sink in (self.file, self.printer):
            if sink is not None:
                sink.write(output)
        self.progress.advance(prompts=1)

    @property
    def reader_has_left(self) -> bool:
        """Results go to standard output, and nobody reads it any more."""
        return self.printer is not None and self.printer.reader_has_left

    def step(self, tokens: int, mail: Mailbox) -> None:
        """A step of this replica has sampled `tokens`; the other replicas' are guessed from them."""
        self.progress.advance(tokens=tokens * self._dp)
        self.collect(mail)

    def collect(self, mail: Mailbox) -> None:
        """Write what the other replicas have sent, if it is time to look; let them know that nobody reads it."""
        if mail.senders and time.monotonic() - self._last_look > MAIL_INTERVAL:
            self._last_look = time.monotonic()
            if self.reader_has_left:
                mail.stop()
            for output in mail.take():
                self.write(output)


class Mailbox:
    """Results on their way from other replicas' control ranks to the writer, through the run's store."""

    def __init__(self, replica: Replica):
        self.replica = replica
        self.store = replica.runtime.store
        self.senders = set(range(1, replica.layout.dp))
        """Replicas that may still send."""
        self.reader_has_left = False
        """As the writer has said; known after a letter to it."""
        self._posted = 0
        self._taken = dict.fromkeys(self.senders, 0)

    def post(self, output: RequestOutput) -> None:
        self._put(output.to_line())
        self.reader_has_left = self.store.check([f"{_MAIL}/enough"])

    def stop(self) -> None:
        """Tell the other replicas to leave off."""
        self.store.set(f"{_MAIL}/enough", "1")

    def _put(self, line: str) -> None:
        self.store.set(f"{_MAIL}/{self.replica.state.coord.dp}/{self._posted}", line)
        self._posted += 1

    def take(self) -> list[RequestOutput]:
        """All that has come since the last look."""
        outputs = []
        for sender in sorted(self.senders):
            while sender in self.senders and self.store.check([key := f"{_MAIL}/{sender}/{self._taken[sender]}"]):
                line = self.store.get(key)
                self.store.delete_key(key)
                self._taken[sender] += 1
                if line == _END:
                    self.senders.remove(sender)
                else:
                    outputs.append(RequestOutput.from_line(line))
        return outputs

    def finish(self, writer: Writer | None) -> None:
        """Every rank: wait until the writer has everything. The watch ends the wait should a rank be lost."""
        if self.replica.layout.dp == 1:
            return
        if writer is None:
            if self.replica.state.is_control:
                self._put(_END.decode())
            while not self.store.check([f"{_MAIL}/all"]):
                time.sleep(MAIL_INTERVAL)
            return
        while self.senders:
            writer.collect(self)
            time.sleep(MAIL_INTERVAL)
        self.store.set(f"{_MAIL}/all", "1")


def weights_identity(folder: Path) -> str:
    """Changes when the weight files do: a digest of their names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
