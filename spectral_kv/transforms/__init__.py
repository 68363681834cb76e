"""Transforms along the token axis, on NumPy, torch and MLX arrays alike."""
