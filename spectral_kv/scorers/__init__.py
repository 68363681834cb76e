"""One file a method: a dataclass with its parameters and one function, `score`."""
