"""What a person can set: the command line, composition, checks, refusals, help."""
