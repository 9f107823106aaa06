"""Plan, compress, load and use a model from Python. `python compress_in_python.py [OUT]`"""

import sys

import torch
from transformers import AutoTokenizer

import trimoe

MODEL = "builtin:mini-mixtral"  # a folder of safetensors or a hub id
out = sys.argv[1] if len(sys.argv) > 1 else "small"

plan = trimoe.plan(MODEL, "expert-drop", ["steps.0.ratio=0.5"])  # sizes, before any weight is read
print(plan)

result = trimoe.compress(MODEL, "expert-drop", out, changes=["steps.0.ratio=0.5"], samples=16)
for layer, decision in sorted(result.decisions.items()):
    print(f"layer {layer} keeps experts {decision.keep}")

model = trimoe.load(out)
tokenizer = AutoTokenizer.from_pretrained(out)
prompt = tokenizer("The President said", return_tensors="pt")
with torch.inference_mode():
    text = model.generate(prompt["input_ids"], max_new_tokens=12, do_sample=False)
print(tokenizer.decode(text[0]))
