"""The same prompts with and without cached prefixes: a long common beginning is computed once."""

import sys

from megalite import LLM, SamplingParams

prefix = "Here are facts that every answer has to rest upon, so they stand first. "
prompts = [prefix + question for question in ("Who?", "What?", "Where, and when?")]
sampling_params = SamplingParams(temperature=0.0, max_tokens=8)

regular_llm = LLM(model=sys.argv[1], dtype="float32", enable_prefix_caching=False, gpu_memory_utilization=0.4)
regular = regular_llm.generate(prompts, sampling_params)
del regular_llm

llm = LLM(model=sys.argv[1], dtype="float32", enable_prefix_caching=True, gpu_memory_utilization=0.4)
llm.generate(prompts[0], sampling_params)  # so that its beginning is in the cache
outputs = llm.generate(prompts, sampling_params)

same = all(a.outputs[0].text == b.outputs[0].text for a, b in zip(regular, outputs, strict=True))
print(f"Generated texts are the same: {same}")
