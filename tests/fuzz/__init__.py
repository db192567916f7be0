"""Random settings and damaged files at the checks of all recipes; `python -m tests.fuzz.campaign --help`."""
