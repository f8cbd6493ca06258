"""Completions of a few prompts."""

import sys

from megalite import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "a"]
sampling_params = SamplingParams(temperature=0.0, top_p=0.95, max_tokens=12)

llm = LLM(model=sys.argv[1], dtype="float")
outputs = llm.generate(prompts, sampling_params)

for output in outputs:
    print(f"Prompt: {output.prompt!r}, Output: {output.outputs[0].text!r}")
