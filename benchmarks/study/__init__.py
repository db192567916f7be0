"""The study of docs/study.md: the papers' claims, tried at a size that two cores can do."""
