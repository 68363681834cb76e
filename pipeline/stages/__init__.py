"""The stages that come before measuring: prefill, then compress."""
