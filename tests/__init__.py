"""A package, so that rank processes import tests by name: NeMo installs a top-level `tests` of its own."""
