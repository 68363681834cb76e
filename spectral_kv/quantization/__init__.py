"""Packed storage of keys and values."""
