"""LLaDA folders behind lm-evaluation-harness, as the model `baatt_llada`; `python -m baatt.lab.lm_eval` runs it."""
