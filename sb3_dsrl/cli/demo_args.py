"""Flags of commands that can do without the flow's demos."""

from dataclasses import dataclass
from pathlib import Path

from sb3_dsrl import Demos, load_demos
from sb3_dsrl.cli.common import refuse


@dataclass(kw_only=True)
class DemoArgs:
    """Demos to compare with."""

    demo_path: Path | None = None
    """Demos of the flow, to compare the spread of its actions with."""
    num_demos: int | None = None
    """Use the first so many demos; all if not given."""

    def load_demos(self) -> Demos | None:
        """
        :return: the demos; None without ``--demo_path``
        :raises ValueError: if ``--num_demos`` is given without it
        :raises DemoError: if they cannot be read
        """
        if self.demo_path is None:
            refuse(dict(num_demos=self.num_demos), "does nothing without --demo_path")
            return None
        return load_demos(self.demo_path, self.num_demos)
