"""`python -m pipeline`: one run, or with `-m` a sweep."""

from pipeline.cli import main

main()
