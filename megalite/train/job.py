"""What `launch/train.py` does: text, model and trainer put together; steps, evaluations, checkpoints, an export."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.chat import section_variables
from megalite.config.load import Loaded
from megalite.config.schema import SamplingParams, TrainConfig
from megalite.core.agreement import reduce, wait_for_all
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.errors import EXIT_DONE, CheckpointError, ConfigError, MegaliteError, Problem, Stopped
from megalite.files import remove_left_behind, write_durably
from megalite.monitor.words import format_rate, wrapped
from megalite.preflight import given
from megalite.run import runtime as distributed
from megalite.run import tracing
from megalite.train import card
from megalite.train.checkpoint import claim, load_state, remove_unfinished, state_to_resume
from megalite.train.data.prepared import PREPARED, Corpus, prepare
from megalite.train.data.reading import open_reader
from megalite.train.flops import AdapterSize, peak_of_run, training_flops
from megalite.train.log import RunLog, Speed, print_report
from megalite.train.micro_batch import MicroBatch
from megalite.train.model import Scorer
from megalite.train.new_model import config_of, make_trainer, starting_point
from megalite.train.optimizer import learning_rate
from megalite.train.trained import trained_of
from megalite.train.trainer import StepReport
from megalite.weights.folder import ModelFolder

WriteSamples = Callable[..., list[str | None]]
"""See `hybrid.samples.write_samples`, which is above this room: training knows no engine."""


def run(loaded: Loaded[TrainConfig], write_samples: WriteSamples) -> int:
    """Train as the config says; every rank calls it. Returns the exit code, 0 also after a SIGTERM and a save.

    `write_samples` lets the trained model write for its card.
    """
    config = loaded.config
    assert isinstance(config, TrainConfig)
    with distributed.start(config.distributed, given(loaded)) as runtime:
        distributed.prepare_deepspeed(runtime)
        Job(config, runtime, write_samples).run()
    return EXIT_DONE


class Job:
    """One training run, from its output folder to its model card."""

    def __init__(self, config: TrainConfig, runtime: distributed.Runtime, write_samples: WriteSamples):
        parallel = config.parallel
        layout = Layout(*parallel.sizes, interleave=parallel.interleave, stages=parallel.stages)
        self.config = config
        self.runtime = runtime
        self.device = runtime.device
        self._write_samples = write_samples
        self.state = ParallelState(layout, sequence_parallel=parallel.sequence_parallel)
        self.is_writer = self.state.rank == layout.first_rank
        assert config.output.folder is not None, "the config's rules see to it"
        self.folder = Path(config.output.folder)
        self.states = self.folder / "training" / "state"
        self.claim = claim(self.folder, patience=config.distributed.peer_timeout) if self.is_writer else None
        wait_for_all(self.state.world)  # before any rank looks for a state, which another run could still replace
        self.found = state_to_resume(self.states, resume=config.output.resume)
        self.corpus = self._open_corpus()
        self.base = self._open_base()
        self.model = self.base.model
        self.trained = trained_of(config.train.lora, self.base)
        self.adapter_size = AdapterSize.of(self.trained.adapter)
        self.base_licence = card.licence_of(self.base.path)
        self.trainer = make_trainer(config, self.trained, self.state, steps=config.train.steps, device=self.device)
        self.reader = open_reader(self.corpus, config.data, config.train, self.state)
        self.history = card.RunHistory()
        self.log: RunLog | None = None
        self.peak = peak_of_run(
            self.device, config.model.dtype, ranks=layout.size, local_ranks=runtime.local_world_size
        )
        self.stop_signal = 0
        self.began = time.monotonic()

    def run(self) -> None:
        """Run the job. A signal makes it save and end, and a later run goes on; raises Stopped if that was a SIGINT.

        A scheduler that takes a machine away sends SIGTERM, and what has saved all it has in time did not fail.
        """
        try:
            self._resume()
            if self.is_writer:
                board = self.config.output.tensorboard
                self.log = RunLog(self.folder / "training", step=self.trainer.steps_done, tensorboard=board)
            self._say(self.reader.describe())
            before, read = self.trainer.steps_done, self.history.tokens
            with tracing.measured(self.config.monitor, self.runtime, self.state, shows=self.is_writer):
                reason = self._train()
            steps, tokens = self.trainer.steps_done - before, self.history.tokens - read
            if self.config.monitor.report and steps:
                print_report(self.trainer.decoder, self.state.rank, steps=steps, tokens=tokens, writes=self.is_writer)
            self._say(f"training ends after step {self.trainer.steps_done}: {reason}")
            if self.stop_signal == signal.SIGINT:
                raise Stopped(self.stop_signal)
            if not self.stop_signal:
                self._finish()
        finally:
            if self.log is not None:
                self.log.close()
            if self.claim is not None:
                self.claim.close()

    # ---- putting it together -----------------------------------------------------------------------------------

    def _open_corpus(self) -> Corpus:
        folder, config = self.folder / PREPARED, self.config
        if self.is_writer:
            remove_unfinished(self.states)
            remove_left_behind(self.folder, self.folder / "training")
            named = ModelFolder.open(config.model.path).generation.eos_token_ids if config.model.path else ()
            prepare(
                config.data,
                replace(config.tokenizer, path=config.tokenizer.path or config.model.path),
                folder,
                in_use=self.found is not None,
                ends=named,
                model=config_of(config.model),
            )
        wait_for_all(self.state.world)
        return Corpus.open(folder)

    def _open_base(self) -> ModelFolder:
        corpus, length = self.corpus, self.config.data.sequence_length
        base = starting_point(
            self.config.model,
            tokenizer=corpus.folder,
            vocab_size=corpus.vocab_size,
            end=corpus.eos_token_id,
            taught=corpus.ends,
        )
        if base.model.max_position_embeddings < length:
            rule = f"must be at most the model's {base.model.max_position_embeddings} positions"
            raise ConfigError(Problem(key="data.sequence_length", rule=rule, value=length))
        return base

    def _resume(self) -> None:
        if self.found is None:
            if (self.folder / "training" / "log.jsonl").exists():
                self._say(f"there is a log, but no whole state in {self.states}: training begins anew")
            return
        path, manifest = self.found
        self.trained.check(manifest)
        if manifest.training.get("data") != self.corpus.digest:
            raise CheckpointError(f"{path}: the run read other text than {self.corpus.folder} holds now")
        load_state(self.trainer, path, manifest)
        self.history = card.RunHistory(**manifest.training["progress"])
        self._say(f"going on after step {self.trainer.steps_done}, from {path}")
        order = manifest.training.get("order", self._order())
        changed = [
            f"{key} was {order.get(key)}, is {value}" for key, value in self._order().items() if order.get(key) != value
        ]
        if changed:
            self._say(f"what is read comes in another order than the run began with: {'; '.join(changed)}")

    def _order(self) -> dict[str, int]:
        """What the order of the data follows from, besides how much has been read."""
        length = {"data.sequence_length": self.config.data.sequence_length} if self.corpus.is_text else {}
        return {"data.seed": self.config.data.seed, **length}

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _train(self) -> str:
        """Steps until there is a reason to stop; gives the reason."""
        train, trainer = self.config.train, self.trainer
        speed = Speed(self.state.meter)
        reason = self._done()
        if reason is not None and self.history.best_loss is None:  # it was stopped before there was a model
            self._evaluate()
        while reason is None:
            data = self.reader.step(self.history.sequences)
            report = trainer.step(data.batches)
            tokens = sum(data.lengths)
            self.history.sequences += self.reader.sequences_per_step
            self.history.tokens += tokens
            speed.count(tokens, training_flops(self.model, data.lengths, self.adapter_size))
            step = trainer.steps_done
            reason = self._done() or self._stop_asked()
            if step % train.log_every == 0 or reason is not None:
                self._report(report, speed)
            if step % train.eval_every == 0 or (reason is not None and not self.stop_signal):
                with self.state.meter.part("evaluation"):
                    self._evaluate()
                reason = self._done() or reason
            if step % train.save_every == 0 or reason is not None:
                with self.state.meter.part("checkpoint"):
                    self._require_finite(report)
                    progress = asdict(self.history)
                    training = {"data": self.corpus.digest, "order": self._order(), "progress": progress}
                    self.trained.save(trainer, self.states, training)
        return reason

    def _done(self) -> str | None:
        """Why there is nothing left to do; the same on every rank."""
        train = self.config.train
        if self.trainer.steps_done >= train.steps:
            return "all steps are done"
        if train.patience is not None and self.history.evaluations_since_best >= train.patience:
            return f"{train.patience} evaluations without a lower held-out loss"
        return None

    def _stop_asked(self) -> str | None:
        """What the clock or a signal on any rank asks for, agreed on by all."""
        limit = self.config.train.max_seconds
        late = limit is not None and time.monotonic() - self.began > limit
        # Not on the device: that would wait for it.
        asked = torch.tensor([self.runtime.signal_received() or 0, int(late)], dtype=torch.int32)
        self.stop_signal, late = reduce(asked, dist.ReduceOp.MAX, self.state.world).tolist()
        if self.stop_signal:
            return f"stopped by {signal.Signals(self.stop_signal).name}"
        return f"train.max_seconds={limit:g} are over" if late else None

    def _report(self, report: StepReport, speed: Speed) -> None:
        """The line of a step."""
        trainer, optimizer, steps = self.trainer, self.config.optimizer, self.config.train.steps
        value, norm = self._require_finite(report)
        tokens, flops = speed.read()
        rate = learning_rate(optimizer, trainer.steps_done - 1, steps)
        line = f"step {trainer.steps_done}/{steps}  loss {value:.4f}  lr {rate:.2e}  norm {norm:.3f}"
        line += f"  {format_rate(tokens, 1)} tokens/s"
        values: dict[str, Any] = {"loss": value, "lr": rate, "gradient_norm": norm, "tokens_per_second": tokens}
        if self.device.type == "cuda":
            utilisation = flops / self.peak if self.peak is not None else None
            values["mfu"] = utilisation
            line += f"  MFU {utilisation:.1%}" if utilisation is not None else ""
        self._say(line, values)

    def _require_finite(self, report: StepReport) -> tuple[float, float]:
        """Mean loss and gradient norm of the last step; MegaliteError if the weights can't be right after it."""
        value, norm = self.trainer.read(report)["loss"], self.trainer.gradient_norm
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise self._diverged(f"the loss is {value:g}, the gradient norm {norm:g}")
        return value, norm

    def _diverged(self, sign: str) -> MegaliteError:
        """By what `sign` the weights can't be right any more."""
        return MegaliteError(
            f"step {self.trainer.steps_done}: {sign}. Lower optimizer.learning_rate (now "
            f"{self.config.optimizer.learning_rate:g}) or lengthen optimizer.warmup_steps; run again, training goes on "
            "from the last good state, if there is one."
        )

    def _evaluate(self) -> None:
        """Measure the held-out loss; keep the model if it is the best so far. MegaliteError: it is no number."""
        history, step = self.history, self.trainer.steps_done
        if history.evaluations and history.evaluations[-1]["step"] == step:
            return
        loss = self.trainer.evaluate(self.reader.held_out(self.config.train.eval_batches))
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss is {loss:g}")
        bits = card.bits_per_byte(loss, self.corpus)
        history.evaluations.append({"step": step, "loss": loss, "bits_per_byte": bits})
        history.evaluations_since_best += 1
        best = history.best_loss is None or loss < history.best_loss
        if best:
            history.best_loss, history.best_step, history.evaluations_since_best = loss, step, 0
            history.best_sequences, history.best_tokens = history.sequences, history.tokens
            self.trained.export(self.trainer.decoder, self.folder, self.config.model.dtype)
        self._say(
            f"step {step}  held-out loss {loss:.4f}, {bits:.4f} bits per byte{' (best so far)' if best else ''}",
            {"held_out_loss": loss, "bits_per_byte": bits},
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Read the exported model back, measure it, let it write, and make the model card of that.

        A signal ends it without the card; what was trained is in the folder already. Raises Stopped for a SIGINT.
        """
        history = self.history
        wait_for_all(self.state.world)
        try:
            loss, samples = self._exported_model()
        except Stopped as stop:
            self._say(
                f"stopped by {signal.Signals(stop.signum).name} before the model card: the {self.trained.noun} of step "
                f"{history.best_step} is in {self.folder}, and a further run writes its card"
            )
            if stop.signum == signal.SIGINT:
                raise
            return
        if self.is_writer:
            text = card.write(
                self.config,
                self.model,
                self.corpus,
                history,
                steps_run=self.trainer.steps_done,
                loss=loss,
                samples=samples,
                base_licence=self.base_licence,
                adapter=self.trained.adapter,
            )
            write_durably(self.folder / "README.md", text)
        bits = card.bits_per_byte(loss, self.corpus)
        line = f"the {self.trained.noun} of step {history.best_step} is in {self.folder}"
        self._say(
            f"{line}: held-out loss {loss:.4f}, {bits:.4f} bits per byte",
            {"exported_step": history.best_step, "held_out_loss": loss, "bits_per_byte": bits},
        )

    def _exported_model(self) -> tuple[float, list[tuple[str, str]]]:
        """Held-out loss of the model in the folder, and what it makes of train.sample_prompts."""
        config, layout = self.config, self.state.layout
        state = ParallelState(Layout(*layout.sizes, stages=layout.stages))  # generation knows no interleaving
        decoder = self.trained.read_back(self.folder, state, config.model.dtype, self.device)
        loss = Scorer(decoder).mean_loss(self._until_stopped(self.reader.held_out(None)))
        written = config.train.sample_prompts
        if not written:
            return loss, []
        self._say(f"writing {len(written)} sample{'s' if len(written) > 1 else ''} for the model card")
        chats = self.corpus.facts["splits"]["train"].get("chats", 0) > 0
        answers = self._write_samples(
            decoder,
            self.folder,
            [[{"role": "user", "content": text}] for text in written] if chats else written,
            self.runtime,
            sampling=SamplingParams(temperature=card.SAMPLE_TEMPERATURE, max_tokens=card.SAMPLE_TOKENS),
            seed=config.train.seed,
            chat_variables=section_variables(config.data),
        )
        shown = [f"user: {text}\n\nassistant: " for text in written] if chats else written
        return loss, [(text, answer) for text, answer in zip(shown, answers, strict=True) if answer is not None]

    def _until_stopped(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches; Stopped on every rank when a signal has reached one."""
        for batch in batches:
            self._stop_asked()
            if self.stop_signal:
                raise Stopped(self.stop_signal)
            yield batch

    def _say(self, line: str, values: dict[str, Any] | None = None) -> None:
        """A line on the terminal and, with `values`, one in the log; by one rank."""
        if not self.is_writer:
            return
        print(wrapped(line), flush=True)
        if values is not None and self.log is not None:
            self.log.write(self.trainer.steps_done, values)
