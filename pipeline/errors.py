"""Errors that are for the person at the keyboard."""


class InputError(ValueError):
    """Something in the configuration or the files it names can't be used.

    The message says what and what to write instead.
    """
