"""A transform coder for caches: keys before RoPE and values, decorrelated over heads and layers."""
