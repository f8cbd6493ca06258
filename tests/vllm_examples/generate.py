"""Engine and sampling options from the command line."""

import argparse

from megalite import LLM, SamplingParams

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--dtype", default="auto")
parser.add_argument("--max-tokens", type=int)
parser.add_argument("--temperature", type=float)
parser.add_argument("--top-p", type=float)
parser.add_argument("--top-k", type=int)
args = vars(parser.parse_args())
sampling = {name: args.pop(name) for name in ("max_tokens", "temperature", "top_p", "top_k")}

llm = LLM(**args)
sampling_params = llm.get_default_sampling_params()
for name, value in sampling.items():
    if value is not None:
        setattr(sampling_params, name, value)

outputs = llm.generate([{"prompt": "Hello, my name is"}, {"prompt": "The future of AI is"}], sampling_params)
alone = llm.generate("Hello, my name is", SamplingParams(**{k: v for k, v in sampling.items() if v is not None}))

for output in outputs:
    print("-" * 50)
    print(f"Prompt: {output.prompt!r}\nGenerated text: {output.outputs[0].text!r}")
