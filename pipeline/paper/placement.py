"""Where jobs would run, without loading a framework to ask it."""

import json
import os
import platform
from glob import glob
from importlib.metadata import version
from pathlib import Path

from pipeline.settings.config import BackendConfig


class Placements:
    """What `auto` stood for when it was asked last, in a file; asked again once the machine, its accelerators or torch
    are others.

    Importing torch and transformers takes seconds, and a document whose runs are all there needs neither.
    """

    def __init__(self, memory: Path):
        self._memory = memory
        accelerators = sorted(glob("/dev/nvidia*") + glob("/dev/kfd") + glob("/dev/dxg"))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._machine = json.dumps([platform.node(), accelerators, visible, version("torch")])
        try:
            remembered = json.loads(memory.read_text())
        except (OSError, ValueError):
            remembered = {}
        self._known = remembered if remembered.get("machine") == self._machine else {"machine": self._machine}

    def forget(self) -> None:
        """Ask again."""
        self._known = {"machine": self._machine}

    def of(self, config: BackendConfig) -> tuple[str, str]:
        """The device and the dtype that a backend would take."""
        key = f"{config._target_} {config.device} {config.dtype}"
        if key not in self._known:
            from pipeline.run import placed

            self._known[key] = placed(config)
            self._memory.write_text(json.dumps(self._known))
        return tuple(self._known[key])
