"""Options of a command: what cannot be read is told in one line, with the option that was probably meant."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from megatron_med.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser, without its page of usage before a fault.

    Raises:
        UserError: an option that there is not, a value that does not fit, something that is missing.
    """

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], sorted(self._options()), n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}. {self.prog} --help lists what there is.")

    def _options(self) -> set[str]:
        """Those of the commands below it, too."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update(*(parser._options() for parser in action.choices.values()))
        return found
