"""Before and after on held-out text: perplexity, KL, agreement. `python evaluate.py [OUT]`"""

import sys

import trimoe

MODEL = "builtin:mini-mixtral"
out = sys.argv[1] if len(sys.argv) > 1 else "small"

trimoe.compress(MODEL, "slim-int8", out)
report = trimoe.evaluate(out, against=MODEL, text=["builtin:mixed"], tokens=512)
for text in report["texts"]:
    before, after = text["against"]["perplexity"], text["perplexity"]
    print(f"{text['name']}: perplexity {before:.2f} -> {after:.2f}, KL {text['kl']:.4f}, the same next token in {text['agreement']:.1%}")
print(f"mean KL {report['mean_kl']:.4f} nats per token")
