"""How kept tokens are held: as they are, or packed. Any scorer combines with any storage."""
