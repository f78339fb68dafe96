"""What fedsim raises when the user's input can't be used: one clear line, no traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend; the message says what, where and what is allowed."""


class ConfigError(UserError):
    """An experiment file, a ``--set`` override or a hyperparameter can't be used."""


class DataError(UserError):
    """A data source, partition or labelling can't be used as asked."""


class EngineError(UserError):
    """The simulation can't start or go on."""
