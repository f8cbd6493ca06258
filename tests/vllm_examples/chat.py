"""Answers to one conversation, to several at once, and by a template of one's own."""

import sys

from megalite import LLM

llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=128, seed=0)
sampling_params = llm.get_default_sampling_params()
sampling_params.max_tokens = 8
sampling_params.temperature = 0.0

conversation = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! What is it?"},
    {"role": "user", "content": "An essay"},
]
outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
several = llm.chat(messages=[conversation] * 3, sampling_params=sampling_params, use_tqdm=True)

chat_template = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
templated = llm.chat(conversation, sampling_params, use_tqdm=False, chat_template=chat_template)

tokenizer = llm.get_tokenizer()
text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, add_special_tokens=False).input_ids
same = llm.generate({"prompt_token_ids": ids}, sampling_params)

for output in outputs + several + templated + same:
    print(f"Prompt: {output.prompt!r}\nGenerated text: {output.outputs[0].text!r}")
