"""lm-evaluation-harness with the model `spectral_kv` and the tasks beside this file.

    python -m spectral_kv.lm_eval --model spectral_kv \
        --model_args pretrained=<folder>,method=wavelet_tri,budget=512 --tasks spectral_kv_lookups,hellaswag

All arguments are those of `lm_eval`, which finds models of other packages only if someone has imported them.
"""

import sys
from pathlib import Path


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit("spectral_kv.lm_eval needs lm_eval: pip install 'spectral-kv[lm-eval]'")
    import spectral_kv.lm_eval.model  # noqa: F401  it registers itself

    tasks = Path(__file__).parent / "tasks"
    given = {argument.partition("=")[0] for argument in sys.argv}
    if "--tasks" in given and "--include_path" not in given:
        sys.argv += ["--include_path", str(tasks)]
    cli_evaluate()


if __name__ == "__main__":
    main()
