"""Compressed caches in lm-evaluation-harness, which `pip install 'spectral-kv[lm-eval]'` brings."""
