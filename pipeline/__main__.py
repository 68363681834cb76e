"""`python -m pipeline`: one run, or with `-m` a sweep."""

import sys


def main() -> None:
    """Help comes from the configuration files alone; everything else is composed by Hydra."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        from pipeline.settings.folders import conf_dir
        from pipeline.settings.manual import help_text

        print(help_text(conf_dir()))
        return
    from pipeline.settings import cli

    cli.main()


if __name__ == "__main__":
    main()
