"""The phases of the evaluation, one file each."""
