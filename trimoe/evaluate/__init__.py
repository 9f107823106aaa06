"""How good a checkpoint is. Reads finished folders only.

texts.py        perplexity, KL and agreement on texts, both models streamed; intervals.py: how sure these numbers are
harness.py      lm-eval tasks side by side; taskset.py: which tasks a name means; lm.py: models as lm-eval calls them, streamed ones too
seeded.py       random generators, lent to lm-eval
generation.py   whether what it writes loops or stops at once
cache.py        what was measured before
run.py          the whole job
"""
