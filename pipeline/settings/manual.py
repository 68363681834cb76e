"""The text of `python -m pipeline --help`, read from the configuration files themselves."""

from pathlib import Path

import yaml

ORDER = ("method", "variant", "model", "budget", "storage", "backend", "document", "phase", "tracking", "experiment")


def _described(path: Path) -> tuple[str, str]:
    """First comment of a configuration file that is not a package directive, and the settings with their comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    comment = lines[0].removeprefix("# ")
    body = [
        line
        for line in lines
        if line.strip() and not line.startswith(("#", "_target_", "name:", "title:", "defaults:", "  - "))
    ]
    return comment, "\n".join(body)


def manual(folder: str) -> str:
    """Every group with its options and what they are, then every setting of the default options with its unit.

    Parameters
    ----------
    folder : str
        The configuration folder.
    """
    conf = Path(folder)
    root = (conf / "config.yaml").read_text()
    defaults: dict[str, list[str]] = {}
    for entry in yaml.safe_load(root)["defaults"]:
        if isinstance(entry, dict):
            for group, option in entry.items():
                defaults[group] = option if isinstance(option, list) else [str(option)]
    text = ["Groups and their options (group=option; * is the default)\n"]
    for group in ORDER:
        text.append(group)
        for path in sorted((conf / group).glob("*.yaml")):
            mark = "*" if path.stem in defaults.get(group, []) else " "
            text.append(f"  {mark} {path.stem:<18} {_described(path)[0]}")
    text.append("\nSettings of the default options (group.setting=value)\n")
    for group in ORDER:
        for option in defaults.get(group, []):
            path = conf / group / f"{option}.yaml"
            prefix = f"{group}.{option}" if group == "phase" else group
            settings = _described(path)[1] if path.is_file() else ""
            text += [f"  {prefix}.{line}" for line in settings.splitlines()]
    general = root.split("\n\n")[1]
    text += [f"  {line}" for line in general.splitlines()]
    return "\n".join(text)


def help_text(folder: str) -> str:
    """The whole text of `--help`.

    Made here and not by Hydra, which would compose every option of every group first, and take seconds for it.
    """
    words = yaml.safe_load((Path(folder) / "hydra" / "help" / "pipeline.yaml").read_text())
    return f"{words['header']}\n{manual(folder)}\n\n{words['footer']}"
