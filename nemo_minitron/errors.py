"""What a recipe's exit code tells: the exceptions behind 2, 1 and 75."""


class InputError(ValueError):
    """Bad input: one line that names the value, the place and what would be legal.

    Recipes turn it into that line on stderr and exit code 2, before a model is loaded or an artifact written.
    """


class FailedRun(RuntimeError):
    """The run must not go on: one line that names what was found and what was expected.

    Recipes turn it into that line on stderr and exit code 1; what was finished is kept.
    """


class InterruptedRun(Exception):
    """The run was told to end and has saved a checkpoint from which it goes on when it is started again.

    Recipes turn it into one line on stderr and exit code 75 (EX_TEMPFAIL of sysexits.h).
    """
