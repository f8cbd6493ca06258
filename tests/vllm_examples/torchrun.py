"""One copy of this program a rank, each with all prompts and all results: torchrun --nproc-per-node 2."""

import json
import sys

import torch.distributed as dist

from megalite import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "a"] * 2
sampling_params = SamplingParams(temperature=0.0, max_tokens=6)

llm = LLM(
    model=sys.argv[1],
    dtype="float32",
    tensor_parallel_size=2,
    distributed_executor_backend="external_launcher",
    max_model_len=128,
    seed=1,
)
outputs = llm.generate(prompts, sampling_params)

if dist.get_rank() == 0:
    print(json.dumps([output.outputs[0].token_ids for output in outputs]))
