"""Caches at rest: a transform coder and an entropy coder, by torch on whatever device the keys lie."""
