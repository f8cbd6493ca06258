"""The hybrid job: sample with the model, reward the samples, train on them, sample with what came of it.

    every iteration   sync weights -> sample -> reward -> learn -> keep samples, log, checkpoint

Every rank runs the same loop. A rank outside a layout takes part in what the run does together: syncs, the way of the
samples to all ranks, and the decision to stop.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256

import torch
import torch.distributed as dist

from megalite.config.load import Loaded
from megalite.config.schema import HybridConfig, ParallelSection
from megalite.core.agreement import broadcast_bytes, compare_ranks, reduce, wait_for_all
from megalite.core.layout import Layout
from megalite.core.linear import store_by_input
from megalite.core.parallel_state import ParallelState
from megalite.errors import EXIT_DONE, Stopped
from megalite.hybrid.generator import Generator
from megalite.hybrid.job_files import HybridProgress, JobFiles
from megalite.hybrid.learner import Learner
from megalite.hybrid.log import HybridLog
from megalite.hybrid.reference import OtherAdapters, OtherModel, Reference
from megalite.hybrid.rollout import Rollout
from megalite.hybrid.sync import Sync
from megalite.inference.replica import Replica
from megalite.inference.sampler import policy_temperature
from megalite.model.decoder import Decoder
from megalite.monitor.collector import Meter
from megalite.preflight import given
from megalite.rewards.pool import RewardPool, Sample, Scored
from megalite.run import runtime as distributed
from megalite.run import tracing
from megalite.train.data.order import TrainingOrder
from megalite.train.flops import peak_of_run
from megalite.train.log import print_report
from megalite.train.new_model import make_decoder, make_trainer
from megalite.train.trainer import Trainer
from megalite.weights import transfer

MIB = 1 << 20


def run(loaded: Loaded[HybridConfig]) -> int:
    """The whole job; every rank calls it. Returns the exit code."""
    config = loaded.config
    assert isinstance(config, HybridConfig)
    with distributed.start(config.distributed, given(loaded)) as runtime:
        distributed.prepare_deepspeed(runtime)
        Job(config, runtime).run()
    return EXIT_DONE


class Job:
    """One hybrid job, on one rank of it."""

    def __init__(self, config: HybridConfig, runtime: distributed.Runtime):
        self.config = config
        self.runtime = runtime
        self.device = runtime.device
        self.train_layout, self.infer_layout = _layout(config.train.parallel), _layout(config.infer.parallel)
        self.home = self.train_layout.first_rank
        """The rank that rewards, logs and keeps the samples."""
        self.progress = HybridProgress()
        self.files = JobFiles(config, is_writer=runtime.rank == self.home, wait=wait_for_all)
        compare_ranks(sha256(repr(self.files.examples).encode()).digest(), "data.source")
        self.meter = meter = Meter()  # one for both sides, which take turns
        sequence_parallel = config.train.parallel.sequence_parallel
        self.train_state = ParallelState.join(self.train_layout, sequence_parallel=sequence_parallel, meter=meter)
        self.infer_state = ParallelState.join(self.infer_layout, meter=meter)
        ParallelState.make_training_groups(self.train_layout)
        self.trainer = self._make_trainer(self.train_state) if self.train_state else None
        self.reference = self._make_reference(self.trainer) if self.trainer else None
        self.learner = self._make_learner(self.trainer) if self.trainer else None
        self.decoder = self._make_generating_decoder(self.infer_state) if self.infer_state else None
        self.sync = self._make_sync()
        self.generator = self._make_generator()
        self.order = TrainingOrder(len(self.generator.places), config.data.seed)
        peak = peak_of_run(
            self.device, config.model.dtype, ranks=self.train_layout.size, local_ranks=runtime.local_world_size
        )
        self.log = HybridLog(
            config,
            self.files.model,
            self.files.folder,
            self.files.is_writer,
            adapter=self.files.trained.adapter,
            meter=meter,
            peak=peak,
        )
        self.pool: RewardPool | None = None
        """None except on the rank that rewards."""
        self.generates = False
        """The generating decoder has weights."""

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the job. A SIGTERM saves and ends it well; a SIGINT saves and raises Stopped."""
        with ExitStack() as stack:
            stack.callback(self.files.close)
            stack.callback(self.log.close)
            if self.runtime.rank == self.home:
                self.pool = stack.enter_context(self._make_pool())
            self._resume()
            try:
                self._supervise()
                if self.reference is not None and self.config.supervised.steps > 0:
                    self.reference.load(self.files.reference_state())
                self._loop()
            except Stopped as stop:
                name = signal.Signals(stop.signum).name
                self.log.say(f"stopped by {name} after {self.progress.iterations} iterations")
                self._save()
                if stop.signum != signal.SIGTERM:
                    raise
                return
            self._save()
            if self.trainer is not None:
                self.files.export(self.trainer)
            self.log.say(f"the {self.files.trained.noun} is in {self.files.folder}")

    def _loop(self) -> None:
        """The iterations, then where their time went, on every rank."""
        before = self.progress.iterations
        measured = self.trainer.decoder if self.trainer else self.decoder
        assert measured is not None, "a rank is in one layout or in both"
        writes = self.runtime.rank == self.home
        with tracing.measured(self.config.monitor, self.runtime, measured.state, shows=writes):
            while self.progress.iterations < self.config.hybrid.steps:
                self._iterate()
                self._stop_if_asked()
        steps = self.progress.iterations - before
        if self.config.monitor.report and steps:
            tokens = self.log.learnt_tokens
            print_report(measured, self.runtime.rank, steps=steps, tokens=tokens, writes=writes)

    def _supervise(self) -> None:
        """Steps on the task's own responses, before the first samples."""
        section, progress = self.config.supervised, self.progress
        if progress.supervised_steps >= section.steps:
            return
        order = TrainingOrder(len(self.files.responses), self.config.data.seed)
        while progress.supervised_steps < section.steps:
            first = progress.supervised_steps * section.examples_per_step
            if self.learner is not None:
                places = order.indices(first, section.examples_per_step).tolist()
                found = self.learner.supervise([self.files.responses[place] for place in places])
                self.log.supervised(progress.supervised_steps + 1, found)
            progress.supervised_steps += 1
            if self.trainer is not None and self.reference is not None and progress.supervised_steps == section.steps:
                self.files.save_reference(self.trainer)
            self._stop_if_asked()
        self._save()

    def _iterate(self) -> None:
        config, iteration = self.config.hybrid, self.progress.iterations
        self.log.begin()
        with self.meter.part("syncing"):
            if iteration % config.sync_every == 0 or not self.generates:
                self.progress.weight_version = self.sync.push()
                self.generator.renew()
                self.generates = True
        with self.meter.part("sampling"), self._room_for_generating():
            first = iteration * config.prompts_per_step
            order = self.order.indices(first, config.prompts_per_step).tolist()
            places = [self.generator.places[number] for number in order]
            rollouts = self.generator.sample(places, first=first, weight_version=self.progress.weight_version)
        with self.meter.part("rewarding"):
            scored = self._reward(rollouts)
        if self.learner is not None:
            with self.meter.part("learning"):
                update = self.learner.learn(rollouts, scored)
            self.log.iteration(iteration + 1, rollouts, update)
        self.progress.iterations += 1
        if self.progress.iterations % config.save_every == 0 and self.progress.iterations < config.steps:
            self._save()

    @contextmanager
    def _room_for_generating(self) -> Iterator[None]:
        """The KV cache and the optimizer give memory back to each other, as the config says."""
        section = self.config.hybrid
        offloads = self.trainer if section.offload_optimizer else None
        if offloads is not None:
            offloads.offload_optimizer()
        if section.free_kv_while_training:
            self.generator.wake()
        try:
            yield
        finally:  # also when a signal has stopped the sampling: what follows is a checkpoint
            if section.free_kv_while_training:
                self.generator.sleep()
            if offloads is not None:
                offloads.reload_optimizer()

    def _reward(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """The reward of every rollout, on every rank of the training layout.

        Collective over the run; Stopped on every rank, if a signal has come: rewards may take long.
        """
        scored: list[Scored] = []
        if self.pool is not None:
            records = [self.files.examples[one.example].record for one in rollouts]
            samples = [
                Sample(prompt=one.prompt, completion=one.text, example=record)
                for one, record in zip(rollouts, records, strict=True)
            ]
            scored = self.pool.evaluate(samples, lambda: self.runtime.signal_received() is not None)
        self._stop_if_asked()
        if self.train_state is None:
            return []
        rewards = json.dumps([one.reward for one in scored]).encode() if self.pool is not None else None
        found = json.loads(broadcast_bytes(rewards, self.home, self.train_state.world))
        return scored or [Scored(reward=reward) for reward in found]

    def _stop_if_asked(self) -> None:
        """Raise Stopped on every rank when a signal has reached one."""
        asked = torch.tensor([self.runtime.signal_received() or 0], dtype=torch.int32)
        if reduce(asked, dist.ReduceOp.MAX):
            raise Stopped(int(asked))

    # ---- putting it together -------------------------------------------------------------------------------------

    def _make_pool(self) -> RewardPool:
        section = self.config.hybrid
        assert section.reward is not None
        return RewardPool(
            section.reward,
            workers=section.reward_workers,
            time_limit=section.reward_time_limit,
            failure_reward=section.failure_reward,
        )

    def _make_trainer(self, state: ParallelState) -> Trainer:
        config = self.config
        steps = config.supervised.steps + config.hybrid.steps * config.hybrid.updates_per_step
        return make_trainer(config, self.files.trained, state, steps=steps, device=self.device)

    def _make_reference(self, trainer: Trainer) -> Reference | None:
        """The policy as it was before its first update, where the loss measures the distance from it."""
        config, trained, state = self.config, self.files.trained, trainer.state
        if config.hybrid.kl_coefficient == 0 or config.hybrid.algorithm != "grpo":
            return None
        if trained.adapter is not None:
            return OtherAdapters(trainer, off=config.train.lora.path is None and config.supervised.steps == 0)
        if config.supervised.steps > 0:  # it is filled after these
            return OtherModel(trained.receiver(state, config.model.dtype, self.device))
        return OtherModel(make_decoder(config.model, trained, state, device=self.device, seed=config.train.seed))

    def _make_learner(self, trainer: Trainer) -> Learner:
        return Learner(
            trainer,
            self.config.hybrid,
            micro_batch_tokens=self.config.train.micro_batch_tokens,
            temperature=policy_temperature(self.config.sampling),
            reference=self.reference.logprobs if self.reference is not None else None,
        )

    def _make_generating_decoder(self, state: ParallelState) -> Decoder:
        if self.trainer and self.train_layout == self.infer_layout and self.config.train.zero_stage < 3:
            return transfer.twin(self.trainer.decoder, state)  # cut alike and held whole: the same tensors serve both
        decoder = self.files.trained.receiver(state, self.config.model.dtype, self.device)
        if self.device.type == "cpu":
            store_by_input(decoder)
        return decoder.requires_grad_(False)

    def _make_sync(self) -> Sync:
        return Sync(
            self.files.trained.adapter or self.files.model,
            self.trainer.decoder if self.trainer else None,
            self.decoder,
            self.train_layout,
            self.infer_layout,
            bucket_bytes=int(self.config.hybrid.sync_bucket * MIB),
            verify=self.config.hybrid.verify_sync,
            gathered=self.trainer.gathered if self.trainer else None,
        )

    def _make_generator(self) -> Generator:
        config = self.config
        replica = None
        if self.decoder is not None:
            replica = Replica(
                self.decoder,
                self.files.tokenizer,
                self.runtime,
                engine=config.infer.engine,
                dp_mode=config.infer.parallel.dp_mode,
            )
        generator = Generator(
            replica,
            self.infer_layout,
            self.files.examples,
            config.sampling,
            samples=config.hybrid.samples_per_prompt,
            at_once=config.hybrid.prompts_per_step,
            stop_requested=lambda: self.runtime.signal_received() is not None,
        )
        if config.hybrid.free_kv_while_training:
            generator.sleep()
        return generator

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        found = self.files.load_state(self.trainer)
        if found is not None:
            self.progress = found
            self.sync.version = self.progress.weight_version
            self.log.say(
                f"going on after {self.progress.supervised_steps} supervised steps and "
                f"{self.progress.iterations} iterations"
            )
        self.log.resume(self.progress.supervised_steps, self.progress.iterations)

    def _save(self) -> None:
        if self.trainer is not None:
            self.files.save_state(self.trainer, self.progress)


def _layout(parallel: ParallelSection) -> Layout:
    return Layout(*parallel.sizes, parallel.first_rank, parallel.interleave, parallel.stages)
