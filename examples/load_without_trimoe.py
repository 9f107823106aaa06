"""A native folder carries its own code: transformers opens it where trimoe is not installed. `python load_without_trimoe.py [OUT]`"""

import subprocess
import sys

import trimoe

out = sys.argv[1] if len(sys.argv) > 1 else "small"
changes = ["steps.0.counts=global"]  # layers differ in their number of experts: not a stock checkpoint
trimoe.compress("builtin:mini-mixtral", "expert-drop", out, changes=changes, samples=8)

READER = """
import sys
sys.modules["trimoe"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The President said", return_tensors="pt")["input_ids"]
print(type(model).__module__, "writes:", tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0]))
"""
subprocess.run([sys.executable, "-c", READER, out], check=True)
