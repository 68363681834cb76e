"""Keys and values made up to be known: a benchmark whose answers are planted, without a language model."""
