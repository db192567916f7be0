"""The one exception that means "the user can fix this"."""


class InputError(ValueError):
    """Bad input: one line that names the value, the place and what would be legal.

    Recipes turn it into that line on stderr and exit code 2, before a model is loaded or an artifact written.
    """
