"""What a trained model writes, for its card: the engine over a decoder that training has filled."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.config.schema import EngineSection, SamplingParams
from megalite.core.linear import store_by_input
from megalite.errors import ConfigError
from megalite.inference.io.inputs import Prompt, RawRequest
from megalite.inference.replica import Replica
from megalite.inference.run import prepare, prompt_limits, run_everywhere
from megalite.model.decoder import Decoder
from megalite.monitor.progress import ProgressBar
from megalite.run.runtime import Runtime
from megalite.text.tokenizer import Tokenizer


def write_samples(
    decoder: Decoder,
    folder: Path,
    prompts: Sequence[Prompt],
    runtime: Runtime,
    *,
    sampling: SamplingParams,
    seed: int,
    chat_variables: Mapping[str, Any],
) -> list[str | None]:
    """A completion of each prompt, None for one that can't run, on every rank; `folder` has the tokenizer.

    Collective over the decoder's layout. Stopped on every rank, if a signal has come.
    """
    if runtime.device.type == "cpu":
        store_by_input(decoder)
    replica = Replica(decoder.requires_grad_(False), Tokenizer.load(folder), runtime, engine=EngineSection(seed=seed))
    shown = runtime.rank == replica.layout.control_ranks[0]
    try:
        asked = [
            RawRequest(
                prompt=prompt,
                params=sampling,
                id=str(index),
                index=index,
                where=f"train.sample_prompts[{index}]",
                chat_variables=chat_variables,
            )
            for index, prompt in enumerate(prompts)
        ]
        made = prepare(replica, asked, prompt_limits(replica))
        for refused in made:
            if isinstance(refused, ConfigError) and shown:
                print(f"warning: no sample of {refused}", file=sys.stderr)
        requests = [one for one in made if not isinstance(one, ConfigError)]
        found: dict[str, str] = {}
        if requests:
            longest = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
            engine = replica.engine(longest=longest, sequences=len(requests))
            with ProgressBar(len(requests), enabled=shown) as progress:
                outputs = run_everywhere(
                    replica,
                    engine,
                    requests,
                    key="samples",
                    stop_requested=lambda: runtime.signal_received() is not None,
                    progress=progress,
                )
            found = {output.request_id: output.outputs[0].text for output in outputs}
        return [found.get(one.id) for one in asked]
    finally:
        if replica.tokenizer is not None:
            replica.tokenizer.close()
