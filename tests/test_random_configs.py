"""Models whose switches are drawn at random compute what transformers computes with the same files, in any layout.

A handful of draws, the same in every run. More, of all families or of those named:

    python tests/test_random_configs.py COUNT [FIRST_SEED [FAMILY ...]]
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import random_configs
import torch
import torch.nn.functional as F
from pool_replica import generate, make_replica
from reference import load, score
from safetensors.torch import save_file
from train_helpers import build_from

from megalite.config.schema import SamplingParams
from megalite.core.layout import Layout
from megalite.core.parallel_state import ParallelState
from megalite.model import families
from megalite.model.attention import PackedAttention
from megalite.model.config import XIELU_BETA, XIELU_EPS, ModelConfig
from megalite.train.micro_batch import from_sequences
from megalite.train.model import Scorer
from megalite.weights.table import hf_shapes

VOCAB = 103
TOLERANCE = 1e-4
LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
_random = Random(2)
PROMPTS = [[_random.randrange(3, VOCAB) for _ in range(length)] for length in (5, 31)]
MAX_TOKENS = 3


@dataclass(frozen=True)
class Draw:
    """One model, and how it is cut."""

    family: str
    seed: int

    def write(self, folder: Path) -> Layout:
        """Its folder."""
        random = Random(f"{self.family} {self.seed}")
        values = random_configs.draw(random, self.family, random_configs.some_sizes(random, vocab=VOCAB))
        (folder / "config.json").write_text(json.dumps(values))
        config = families.read(folder)
        save_file(weights(config, self.seed), folder / "model.safetensors", {"format": "pt"})
        fits = [one for one in LAYOUTS if one[0] <= config.num_heads and one[1] <= config.num_layers]
        return Layout(*random.choice(fits))


def weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors: vectors matter, and matrices keep the scale of what they are given."""
    generator = torch.Generator().manual_seed(seed)
    names = families.weight_names(config).tensors
    turned = {ref.hf.replace("{layer}", "0") for ref in names.values() if ref.transpose}
    made = {}
    for name, shape in hf_shapes(config).items():
        values = torch.empty(shape)
        if len(shape) == 1 or name.endswith(("norm.weight", "correction_bias")):
            zero_centred = config.zero_centred and "linear_attn" not in name
            mean = 1.0 if re.search(r"(norm|ln_\w+)\.weight$", name) and not zero_centred else 0.0
            made[name] = values.normal_(mean, 0.2, generator=generator)
            continue
        if name in (names["embed"].hf, getattr(names.get("positions"), "hf", None)):
            scale = config.embedding_scale or 1.0
            made[name] = values.normal_(0.0, 0.5 / scale, generator=generator)
            continue
        stands = re.sub(r"\.\d+\.", ".0.", name, count=1) in turned or re.search(r"experts\.(gate_up|down)_proj$", name)
        fan_in = shape[-2] if stands else shape[-1]
        gain = (
            2.0 if name == names.get("lm_head", names["embed"]).hf else 0.25 if "linear_attn.out_proj" in name else 1.0
        )
        made[name] = values.normal_(0.0, gain * fan_in**-0.5, generator=generator)
    for name in [name for name in made if name.endswith("act_fn.alpha_p")]:
        made[name.replace("alpha_p", "beta")] = torch.tensor(XIELU_BETA)
        made[name.replace("alpha_p", "eps")] = torch.tensor(XIELU_EPS)
    return made


def compute(rank: int, folder: Path, layout: Layout):
    """(tokens, log-probabilities [prompt + output - 1, vocab]) of each prompt by the engine, and by packed passes as
    in training the log-probability of each next token."""
    replica = make_replica(rank, folder, layout, block_size=4, max_num_batched_tokens=16, max_num_seqs=3)
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB
    )
    results, sequences = [], []
    for output in generate(replica, [(prompt, params) for prompt in PROMPTS], [""] * len(PROMPTS)):
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        rows = [[entry[token].logprob for token in range(VOCAB)] for entry in entries]
        results.append((output.outputs[0].token_ids, torch.tensor(rows)))
        sequences.append([*output.prompt_token_ids, *output.outputs[0].token_ids])
    [scores] = Scorer(replica.decoder).logprobs([from_sequences(sequences, [[1.0] * (len(s) - 1) for s in sequences])])
    return results, scores


def check(folder: Path, found) -> None:
    """What ranks found is what transformers computes."""
    for results, scores in found:
        nexts = []
        for prompt, (tokens, rows) in zip(PROMPTS, results, strict=True):
            ids = [*prompt, *tokens]
            want = score(folder, ids)[:-1]
            torch.testing.assert_close(rows, want, atol=TOLERANCE, rtol=0)
            nexts.append(want.gather(1, torch.tensor(ids)[1:, None])[:, 0])
            chosen = nexts[-1][len(prompt) - 1 :]
            assert (want[len(prompt) - 1 :].amax(1) - chosen).max() < TOLERANCE, "greedy"
        torch.testing.assert_close(scores, torch.cat(nexts), atol=TOLERANCE, rtol=0)


def check_gradient(folder: Path) -> None:
    """The gradient of the embedding, which has come back through all layers."""
    ids = torch.tensor(PROMPTS[1])
    decoder, theirs = build_from(folder, ParallelState(Layout())), load(folder)
    mine = dict(decoder.named_parameters())["embed.tokens.weight"]
    F.cross_entropy(decoder.logits(decoder(ids[:-1], PackedAttention([len(ids) - 1]))), ids[1:]).backward()
    embedding = theirs.get_input_embeddings().weight
    embedding.grad = None
    F.cross_entropy(theirs(ids[None, :-1], use_cache=False).logits[0], ids[1:]).backward()
    assert (mine.grad - embedding.grad).norm() < 1e-4 * embedding.grad.norm()


DRAWS = [
    *(Draw("glm4_moe_lite", 0), Draw("deepseek_v2", 0), Draw("qwen3_5_moe_text", 0), Draw("granitemoehybrid", 0)),
    *(Draw("gpt_oss", 0), Draw("llama4_text", 0), Draw("smollm3", 0), Draw("hunyuan_v1_moe", 0)),
]


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: f"{draw.family} {draw.seed}")
def test_drawn_models_compute_what_transformers_computes(draw, ranks, tmp_path):
    layout = draw.write(tmp_path)
    check(tmp_path, ranks(layout.size).run(compute, tmp_path, layout))
    check_gradient(tmp_path)


def main(count: int, names: list[str], first: int) -> None:
    """Check draws of every family in turn, each in a layout of its own, and say which fail."""
    from rank_pool import Pools

    pools = Pools()
    texts = names or [name for name, family in families.FAMILIES.items() if family.text_model_type is None]
    failed = 0
    for index in range(count):
        draw = Draw(texts[index % len(texts)], first + index // len(texts))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                layout = draw.write(folder)
                check(folder, pools(layout.size).run(compute, folder, layout))
                check_gradient(folder)
            except Exception as error:
                failed += 1
                print(f"{draw}: {type(error).__name__}: {str(error)[:600]}", flush=True)
                print((folder / "config.json").read_text(), flush=True)
    print(f"{count} draws, {failed} failed")
    pools.close()


if __name__ == "__main__":
    import conftest  # noqa: F401
    from test_random_configs import main as check_many  # ranks know functions by their module

    check_many(int(sys.argv[1]), sys.argv[3:], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
