"""What a run shows: its screen, its figures, its progress."""
