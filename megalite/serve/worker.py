"""The job of a replica's rank: messages of the HTTP process become news of engine steps, and steps' events messages.

All ranks of a replica step alike. The control rank has a connection to the HTTP process and never waits for it while
there is work; without work it sleeps until a message comes, a second at most, and the others sleep in the broadcast of
its next message. A signal is the HTTP process's affair, which ends its replicas with Leave when it has drained.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from megalite.config.command_line import Options
from megalite.config.load import Loaded
from megalite.config.schema import ServeConfig
from megalite.core.collectives import gather_reports
from megalite.errors import EXIT_DONE, maybe_fault
from megalite.inference.channel import News
from megalite.inference.engine import Engine, Events
from megalite.inference.replica import Replica, load_replica
from megalite.monitor.report import format_report
from megalite.preflight import given
from megalite.run import runtime as distributed
from megalite.run import tracing
from megalite.run.runtime import Runtime
from megalite.serve.link import Link, LinkError, connect
from megalite.serve.messages import Abort, Hello, Leave, Step, Submit
from megalite.serve.start import HTTPProcess, replica_address

IDLE = 1.0
"""Seconds between steps of a replica with nothing to do."""
NEWS_EVERY = 0.2
"""Seconds between messages of one that is at work and has nothing to give out."""
BUSY_EVERY = 1.0
"""Seconds between accounts of where its time went."""


def run(loaded: Loaded[ServeConfig], options: Options) -> int:
    """Serve until the HTTP process says Leave; every rank calls it. Errors leave by exception, see run/runtime.py.

    Either these ranks are one replica, `options.replica` of several on this host, whose HTTP process listens at
    `options.socket`; or they are all replicas, started by a launcher, and rank 0 starts the HTTP process.
    """
    config = loaded.config
    number, count = options.replica_place
    with distributed.start(
        config.distributed,
        given(loaded),
        status_file=config.monitor.status_file if count == 1 else None,
        beside=(number, count),
    ) as runtime:
        with ExitStack() as stack:
            front = None
            if not options.socket and runtime.rank == 0:
                front = stack.enter_context(HTTPProcess(loaded, options, runtime))
            replica, _ = load_replica(config, runtime)
            number += replica.state.coord.dp
            engine = replica.engine()
            engine.outputs.replica = number
            engine.warm_up(for_any=True)
            if replica.state.is_last_stage:
                engine.runner.sampler.matchers.prepare()
            gc.freeze()  # what was imported and built stays; collections need not look at it
            worker = None
            if replica.state.is_control:
                address, token = (options.socket, b"") if options.socket else replica_address(runtime)
                connection = connect(address, token=token)
                worker = Worker(engine, Link(connection, patience=config.server.stall_timeout))
                worker.link.send(hello(replica, number))
            tracing.begin(_timeline_of(config.monitor.timeline, number, options), runtime, replica.state)
            replica.meter.start()
            _serve(engine, worker, front, runtime)
            replica.meter.stop()
            tracing.end(runtime, replica.meter)
            if worker is not None:
                worker.link.close()
                if options.socket and not worker.left:
                    raise LinkError(f"replica {number}: the HTTP process is gone")
            if front is not None:
                front.wait()
        reports = gather_reports(replica.report(engine))
        if runtime.rank == 0 and config.monitor.report:
            print(format_report(reports), file=sys.stderr)
    return EXIT_DONE


def _timeline_of(file: str | None, replica: int, options: Options) -> str | None:
    """The timeline of a replica's run: each that is a run of its own has its own file, named by its number."""
    if file is None or not options.replica:
        return file
    path = Path(file)
    name, dot, ending = path.name.partition(".")
    return str(path.with_name(f"{name}-{replica}{dot}{ending}"))


def _serve(engine: Engine, worker: Worker | None, front: HTTPProcess | None, runtime: Runtime) -> None:
    """Step until the HTTP process ends it."""
    ended = False
    while not ended:
        if front is not None:
            front.pass_on(runtime.signal_received())
        maybe_fault("serve.step", runtime.rank)
        if worker is None:
            events = engine.step()
        else:
            worker.wait()
            events = engine.step(worker.news)
            worker.tell(events)
        ended = events.ended


def hello(replica: Replica, number: int) -> Hello:
    """The message by which a replica introduces itself to the HTTP process."""
    return Hello(
        replica=number,
        pid=os.getpid(),
        max_model_len=replica.max_model_len,
        num_kv_blocks=replica.num_blocks,
        block_size=replica.settings.block_size,
        max_num_seqs=replica.settings.max_num_seqs,
        vocab_size=replica.model.vocab_size,
        eos_token_ids=sorted(replica.model.eos_token_ids),
        dtype=str(replica.dtype).removeprefix("torch."),
        device=str(replica.device),
    )


class Worker:
    """A control rank between its engine and the HTTP process."""

    def __init__(self, engine: Engine, link: Link):
        self.engine = engine
        self.link = link
        self.left = False
        """The HTTP process has said Leave."""
        self._steps = 0
        self._told = self._accounted = time.monotonic()

    def wait(self) -> None:
        """Without work, until something comes or it is time for a sign of life."""
        if not self.engine.busy:
            self.link.wait(max(0.0, self._told + IDLE - time.monotonic()))

    def news(self, room: int) -> News:
        """All requests and aborts that have come; those without room yet wait in the scheduler."""
        requests, aborts = [], []
        for message in self.link.receive():
            match message:
                case Submit(request):
                    requests.append(request)
                case Abort(name):
                    aborts.append(name)
                case Leave():
                    self.left = True
        stop = self.left or self.link.ended
        return News(requests=tuple(requests), aborts=tuple(aborts), stop=stop)

    def tell(self, events: Events) -> None:
        """Send the results of a step, and now and then the state of the replica."""
        self._steps += 1
        now = time.monotonic()
        pause = NEWS_EVERY if self.engine.busy else IDLE
        if not (events.deltas or events.outputs or events.started) and now - self._told < pause:
            self.link.send()  # what is left of earlier ones
            return
        engine, scheduler = self.engine, self.engine.scheduler
        busy = {}
        if now - self._accounted >= BUSY_EVERY:
            self._accounted = now
            busy = engine.meter.lap()
        self._told = now
        self.link.send(
            Step(
                deltas=events.deltas,
                outputs=events.outputs,
                step=self._steps,
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                free_blocks=scheduler.pool.num_free,
                prefix_hits=scheduler.stats.prefix_hit_tokens,
                prompt_tokens=engine.prompt_tokens,
                output_tokens=engine.output_tokens,
                preemptions=scheduler.stats.preemptions,
                started=events.started,
                busy=busy,
            )
        )
