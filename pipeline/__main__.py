"""`python -m pipeline`: one run, or with `-m` a sweep."""

from pipeline.settings.cli import main

main()
