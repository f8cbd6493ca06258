"""What `launch/train.py` does: text, model and trainer put together; steps, evaluations, checkpoints, an export."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from megalite.config.load import Loaded
from megalite.config.schema import TrainConfig
from megalite.core import distributed
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import EXIT_DONE, CheckpointError, ConfigError, MegaliteError, Problem, Stopped
from megalite.files import LineFile, write_durably
from megalite.model.config import ModelConfig
from megalite.train import card
from megalite.train.batch import MicroBatch, from_windows
from megalite.train.checkpoint import load_state, newest_state, remove_unfinished, save_state
from megalite.train.data import Corpus, TrainingOrder, held_out_windows, prepare, read_windows
from megalite.train.export import export_model, model_files
from megalite.train.model import Scorer
from megalite.train.new_model import make_decoder, shape_of
from megalite.train.optimizer import learning_rate
from megalite.train.trainer import StepReport, Trainer
from megalite.weights import hf, transfer
from megalite.weights.manifest import Manifest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass
class Progress:
    """What a run knows of itself besides weights; saved with them."""

    sequences: int = 0
    """Training sequences read; counted, because the number in a step changes with the layout."""
    best_loss: float | None = None
    best_step: int = 0
    best_sequences: int = 0
    evaluations_since_best: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)


def run(loaded: Loaded) -> int:
    """Train as the config says; every rank calls it. Returns the exit code."""
    config = loaded.config
    with distributed.start(config.distributed, sha256=loaded.sha256, config_text=loaded.text) as runtime:
        distributed.prepare_deepspeed(runtime)
        Job(config, runtime).run()
    return EXIT_DONE


class Job:
    """One training run, from its output folder to its model card."""

    def __init__(self, config: TrainConfig, runtime: distributed.Runtime):
        parallel = config.parallel
        layout = Layout(tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, interleave=parallel.interleave)
        self.config = config
        self.device = runtime.device
        self._signal_received = runtime.signal_received
        self.state = ParallelState(layout, sequence_parallel=parallel.sequence_parallel)
        self.is_writer = self.state.rank == layout.first_rank
        self.folder = Path(config.output.folder)
        self.states = self.folder / "training" / "state"
        self.found = self._find_state()
        self.corpus = self._open_corpus()
        self.model, self.hf_config = self._make_config()
        self.trainer = Trainer(
            make_decoder(config.model, self.model, self.state, device=self.device, seed=config.train.seed),
            config.optimizer,
            steps=config.train.steps,
            zero_stage=config.train.zero_stage,
            recompute=config.train.recompute,
            deepspeed_keys=config.deepspeed,
        )
        length = config.data.sequence_length
        self.order = TrainingOrder(len(self.corpus.train), length, config.data.seed)
        self.held_out = held_out_windows(len(self.corpus.held_out), length)
        self.progress = Progress()
        self.log = self._open_log() if self.is_writer else None
        self.stop_signal = 0
        self.began = time.monotonic()

    def run(self) -> None:
        """All of it. Raises Stopped when a signal ended it; a later run then goes on."""
        try:
            self._resume()
            reason = self._train()
            self._say(f"training ends after step {self.trainer.steps_done}: {reason}")
            if self.stop_signal:
                raise Stopped(self.stop_signal)
            self._finish()
        finally:
            if self.log is not None:
                self.log.close()

    # ---- putting it together -----------------------------------------------------------------------------------

    def _find_state(self) -> tuple[Path, Manifest] | None:
        """The state to go on from, if there is one: looked for before anything in the folder is touched."""
        found = newest_state(self.states, self.state.tp.size)
        if found is not None and not self.config.output.resume:
            fix = "Set output.resume=true to go on with it, or choose another folder."
            raise ConfigError(Problem(key="output.folder", rule=f"already holds a training run: {found[0]}", fix=fix))
        return found

    def _open_log(self) -> LineFile:
        log = LineFile(self.folder / "training" / "log.jsonl")
        log.cut_torn_line()  # of a run that was killed
        return log

    def _open_corpus(self) -> Corpus:
        folder = self.folder / "training" / "data"
        if self.is_writer:
            remove_unfinished(self.states)
            prepare(self.config.data, self.config.tokenizer, folder, in_use=self.found is not None)
        self._wait_for_all()
        return Corpus.open(folder)

    def _make_config(self) -> tuple[ModelConfig, dict[str, Any]]:
        corpus = self.corpus
        model, values = shape_of(self.config.model, vocab_size=corpus.vocab_size, eos_token_id=corpus.eos_token_id)
        if model.max_position_embeddings < self.config.data.sequence_length:
            rule = f"must be at most the model's {model.max_position_embeddings} positions"
            raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=self.config.data.sequence_length))
        return model, values

    def _resume(self) -> None:
        if self.found is None:
            return
        path, manifest = self.found
        config = model_files(self.hf_config, self.model, "float32")["config.json"]
        keys = sorted(config.keys() | manifest.config.keys())
        changed = [key for key in keys if config.get(key) != manifest.config.get(key)]
        if changed:
            rule = f"is not the model that the run began with: {', '.join(changed)}"
            fix = "Set it back, or choose another output.folder."
            raise ConfigError(Problem(key="model.config", rule=rule, fix=fix))
        if manifest.training.get("data") != self.corpus.digest:
            raise CheckpointError(f"{path}: the run read other text than {self.corpus.folder} holds now")
        load_state(self.trainer, path)
        self.progress = Progress(**manifest.training["progress"])
        self._say(f"going on after step {self.trainer.steps_done}, from {path}")

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _train(self) -> str:
        """Steps until there is a reason to stop; gives the reason."""
        train, trainer = self.config.train, self.trainer
        clock = _Clock(trainer.steps_done)
        reason = self._done()
        while reason is None:
            report = trainer.step(list(self._micro_batches()))
            self.progress.sequences += self._sequences_per_step
            step = trainer.steps_done
            reason = self._done() or self._stop_asked()
            if step % train.log_every == 0 or reason is not None:
                self._report(report, clock)
            if step % train.eval_every == 0 or (reason is not None and not self.stop_signal):
                with clock.paused():
                    self._evaluate()
                reason = self._done() or reason
            if step % train.save_every == 0 or reason is not None:
                with clock.paused():
                    self._require_finite(report)
                    self._save()
        return reason

    def _done(self) -> str | None:
        """Why there is nothing left to do; the same on every rank."""
        train = self.config.train
        if self.trainer.steps_done >= train.steps:
            return "all steps are done"
        if train.patience is not None and self.progress.evaluations_since_best >= train.patience:
            return f"{train.patience} evaluations without a lower held-out loss"
        return None

    def _stop_asked(self) -> str | None:
        """What the clock or a signal on any rank asks for, agreed on by all."""
        limit = self.config.train.max_seconds
        late = limit is not None and time.monotonic() - self.began > limit
        asked = torch.tensor([self._signal_received() or 0, int(late)], dtype=torch.int32)  # not on the device: no wait
        if self.state.layout.size > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.stop_signal, late = asked.tolist()
        if self.stop_signal:
            return f"stopped by {signal.Signals(self.stop_signal).name}"
        return f"train.max_seconds={limit:g} are over" if late else None

    @property
    def _sequences_per_step(self) -> int:
        train = self.config.train
        return train.micro_batch_size * train.gradient_accumulation_steps * self.state.dp.size

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This replica's share of the next step's sequences."""
        train, dp = self.config.train, self.state.dp
        share = train.micro_batch_size * train.gradient_accumulation_steps
        first = self.progress.sequences + dp.rank * share
        for start in range(first, first + share, train.micro_batch_size):
            yield self._windows(self.corpus.train, self.order.starts(start, train.micro_batch_size))

    def _windows(self, tokens: np.ndarray, starts: np.ndarray, counts: list[bool] | None = None) -> MicroBatch:
        return from_windows(torch.from_numpy(read_windows(tokens, starts, self.config.data.sequence_length)), counts)

    def _report(self, report: StepReport, clock: _Clock) -> None:
        trainer, optimizer, steps = self.trainer, self.config.optimizer, self.config.train.steps
        value, norm = self._require_finite(report)
        tokens = self._sequences_per_step * self.config.data.sequence_length
        speed = clock.read(trainer.steps_done) * tokens
        rate = learning_rate(optimizer, trainer.steps_done - 1, steps)
        line = f"step {trainer.steps_done}/{steps}  loss {value:.4f}  lr {rate:.2e}  norm {norm:.3f}"
        self._say(
            f"{line}  {speed:,.0f} tokens/s",
            {"loss": value, "lr": rate, "gradient_norm": norm, "tokens_per_second": speed},
        )

    def _require_finite(self, report: StepReport) -> tuple[float, float]:
        """Mean loss and gradient norm of the last step; MegaliteError if the weights can't be right after it."""
        value, norm = self.trainer.read(report)["loss"], self.trainer.gradient_norm
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise MegaliteError(
                f"step {self.trainer.steps_done}: the loss is {value:g}, the gradient norm {norm:g}. Lower "
                f"optimizer.learning_rate (now {self.config.optimizer.learning_rate:g}) or lengthen "
                "optimizer.warmup_steps; run again, training goes on from the last good state."
            )
        return value, norm

    def _evaluate(self) -> None:
        """Measure the held-out loss; keep the model if it is the best so far."""
        progress, step = self.progress, self.trainer.steps_done
        if progress.evaluations and progress.evaluations[-1]["step"] == step:
            return
        loss = self.trainer.evaluate(self._held_out_batches(self.config.train.eval_batches))
        bits = card.bits_per_byte(loss, self.corpus)
        progress.evaluations.append({"step": step, "loss": loss, "bits_per_byte": bits})
        progress.evaluations_since_best += 1
        best = progress.best_loss is None or loss < progress.best_loss
        if best:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, step, 0
            progress.best_sequences = progress.sequences
            self._export()
        self._say(
            f"step {step}  held-out loss {loss:.4f}, {bits:.4f} bits per byte{' (best so far)' if best else ''}",
            {"held_out_loss": loss, "bits_per_byte": bits},
        )

    def _held_out_batches(self, limit: int | None) -> Iterator[MicroBatch]:
        """This replica's share of the held-out windows, in at most `limit` micro batches over all replicas.

        Every replica gets as many batches; windows that fill up the last ones do not count.
        """
        size, dp = self.config.train.micro_batch_size, self.state.dp
        windows = self.held_out if limit is None else self.held_out[: limit * size]
        for first in range(0, len(windows), size * dp.size):
            mine = range(first + dp.rank * size, first + (dp.rank + 1) * size)
            starts = windows[[min(i, len(windows) - 1) for i in mine]]
            yield self._windows(self.corpus.held_out, starts, [i < len(windows) for i in mine])

    # ---- files ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        copies = self._files_beside("float32")
        training = {"data": self.corpus.digest, "progress": asdict(self.progress)}
        save_state(self.trainer, self.states, training, json.loads(copies["config.json"]), copies)

    def _export(self) -> None:
        """Make the output folder hold the present model."""
        dtype = self.config.model.dtype
        if self.is_writer:
            for name, content in self._files_beside(dtype).items():
                write_durably(self.folder / name, content)
        export_model(self.trainer.decoder, self.folder / hf.SINGLE, transfer.DTYPES[dtype])

    def _files_beside(self, dtype: str) -> dict[str, bytes]:
        """What a model folder holds beside weights in `dtype`, by name."""
        files = model_files(self.hf_config, self.model, dtype)
        found = {
            name: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode() for name, values in files.items()
        }
        for name in TOKENIZER_FILES:
            if (self.corpus.folder / name).is_file():
                found[name] = (self.corpus.folder / name).read_bytes()
        return found

    def _finish(self) -> None:
        """Read the exported model back, measure it, let it write, and make the model card of that."""
        self._wait_for_all()
        decoder = transfer.build(
            self.model, self.state, dtype=transfer.DTYPES[self.config.model.dtype], device=self.device
        )
        transfer.load_folder(decoder, self.folder)
        scorer = Scorer(decoder)
        loss = scorer.mean_loss(self._held_out_batches(None))
        tokenizer = Tokenizer.from_file(str(self.corpus.folder / TOKENIZER_FILES[0]))
        samples = []
        for prompt in self.config.train.sample_prompts:
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            new = card.complete(
                scorer, ids, card.SAMPLE_TOKENS, temperature=card.SAMPLE_TEMPERATURE, seed=self.config.train.seed
            )
            samples.append((prompt, tokenizer.decode(new)))
        progress = self.progress
        result = card.Result(
            step=progress.best_step,
            steps_run=self.trainer.steps_done,
            tokens=progress.best_sequences * self.config.data.sequence_length,
            loss=loss,
            evaluations=progress.evaluations,
            samples=samples,
        )
        if self.is_writer:
            write_durably(self.folder / "README.md", card.write(self.config, self.model, self.corpus, result))
        bits = card.bits_per_byte(loss, self.corpus)
        line = f"the model of step {progress.best_step} is in {self.folder}"
        self._say(
            f"{line}: held-out loss {loss:.4f}, {bits:.4f} bits per byte",
            {"exported_step": progress.best_step, "held_out_loss": loss, "bits_per_byte": bits},
        )

    # ---- small things --------------------------------------------------------------------------------------------

    def _say(self, line: str, values: dict[str, Any] | None = None) -> None:
        """A line on the terminal and, with `values`, one in the log; by one rank."""
        if not self.is_writer:
            return
        print(line, flush=True)
        if values is not None:
            seconds = round(time.monotonic() - self.began, 3)
            self.log.append(json.dumps({"step": self.trainer.steps_done, "seconds": seconds, **values}))

    def _wait_for_all(self) -> None:
        if self.state.layout.size > 1:
            dist.barrier()


class _Clock:
    """Measures steps per second, less the time between."""

    def __init__(self, step: int):
        self._step = step
        self._since = time.monotonic()

    def read(self, step: int) -> float:
        """Steps per second since the last reading; `step` steps are done by now."""
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._since, 1e-9)
        self._step, self._since = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began
