"""megalite as a model of lm-evaluation-harness: `megalite-eval --model megalite --model_args pretrained=FOLDER ...`.

Needs the extra `eval`. `megalite-eval`, or `python -m megalite.evals`, is the harness's own command line with this
model known to it. With a harness that finds no models in other packages (0.4.13), type it in place of `lm_eval`; all
other arguments are the harness's own. Under `torchrun --nproc-per-node N -m megalite.evals` the model is laid out over
N ranks, every rank makes the same calls, and the first reports.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Sequence
from typing import Any

from megalite.config.schema import SamplingParams
from megalite.errors import EXIT_DONE, MegaliteError
from megalite.inference.llm import LLM
from megalite.text.tokenizer import Tokenizer

try:
    # The harness registers its own models by itself only while no other is known.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"megalite.evals needs lm-evaluation-harness: pip install 'megalite[eval]' ({error})") from error

log = logging.getLogger(__name__)

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest output, in the order in which they count."""


class MegaliteLM(TemplateLM):  # type: ignore[misc]
    """Scores and generates as the harness's hf backend does."""

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ):
        """`arguments` are those of `LLM`: dtype, tensor_parallel_size, gpu_memory_utilization...

        `max_length`: most tokens that the model sees at once; None: the model's own. Batch sizes are passed over, the
        engine forms its own. ConfigError, CheckpointError or ResourceError as from `LLM`.
        """
        super().__init__()
        on_cpu = str(device).startswith("cpu")  # the harness says cuda:0 also where there is none
        self.llm = LLM(pretrained, max_model_len=max_length, device="cpu" if on_cpu else None, **arguments)
        atexit.register(self.llm.close)
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._chat_template_args = {**thinking, **(chat_template_args or {})}

    @property
    def tokenizer(self) -> Tokenizer:
        found = self.llm.get_tokenizer()
        if found is None:
            raise ValueError(f"{self.llm.config.model.path}: has no tokenizer.json, which tasks need")
        return found

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.config.model.tokenizer or self.llm.config.model.path).replace("/", "__")

    @property
    def max_length(self) -> int:
        return self.llm.replica.max_model_len

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """Stands before a text without context: bos, or where there is none, eos."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            prefix = "" if self.prefix_token_id is None else self.tokenizer.token_text(self.prefix_token_id)
            add_special_tokens = self._add_bos_token is not False
            if prefix and string.startswith(prefix):
                add_special_tokens = False
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        bos = self.tokenizer.bos_token_id
        if self._add_bos_token and add_special_tokens and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]  # also where the tokenizer by itself adds none
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would have written it."""
        windows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found = []
        scored = self.llm.logprobs([{"prompt_token_ids": window} for window in windows], use_tqdm=not disable_tqdm)
        for (key, _context, continuation), tokens in zip(requests, scored, strict=True):
            if len(continuation) > len(tokens):
                raise ValueError(f"a continuation of {len(continuation)} tokens, and {self.max_length} fit at once")
            wanted = tokens[len(tokens) - len(continuation) :]
            answer = (sum(token.logprob for token in wanted), all(token.is_greedy for token in wanted))
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            mine = [(None, *make_disjoint_window(window)) for window in cut]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params, stops = [], [], []
        for context, options in (request.args for request in requests):
            sampling, until = self._sampling(dict(options))
            room = self.max_length - (sampling.max_tokens or 0)
            prompts.append({"prompt_token_ids": self.tok_encode(context)[-room:]})
            params.append(sampling)
            stops.append(until)
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output, until in zip(requests, outputs, stops, strict=True):
            [one] = output.outputs
            if output.error is not None:
                log.warning("the text of one output is not whole: %s", output.error)
            whole = output.error is None
            text = self.tokenizer.decode(one.token_ids, skip_special_tokens=True) if whole else one.text
            for stop in until:
                text = text.split(stop)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, options: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """The parameters for a task's generation_kwargs, and the texts at which its output is cut."""
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = [options.pop(name, None) for name in _LENGTHS]
        longest = next((length for length in lengths if length is not None), self.max_gen_toks)
        sampled = options.pop("do_sample", None)
        temperature = float(options.pop("temperature", None) or (1.0 if sampled else 0.0))
        own = {key: value for key, value in options.items() if key in SamplingParams.__dataclass_fields__}
        params = SamplingParams(
            **own,
            temperature=0.0 if sampled is False else temperature,
            max_tokens=min(int(longest), self.max_length - 1),
            stop=[stop for stop in until if stop] or None,
        )
        return params, [stop for stop in until if stop]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.chat_text(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_args,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text of the template that `apply_chat_template` uses, which the harness keeps with its results."""
        return self.tokenizer.chat_templates.get("default") if chat_template else None


def main() -> int:
    """The harness's own command line; gives the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MegaliteError as error:
        sys.stderr.writelines(f"{line}\n" for line in error.lines())
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    from megalite.evals import main as registered  # by its own name, under which the harness knows the class

    sys.exit(registered())
else:
    register_model("megalite")(MegaliteLM)
