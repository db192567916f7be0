"""The four groups that Llama-3.1-Minitron-4B was presented with, and which benchmarks stand for each."""

from nemo_minitron.comparison.measured import JUDGED, Score

ROLE_PLAY = f"{JUDGED}, rating, roleplay"
# Group: what its benchmarks' names begin with. Role-play is a category of MT-Bench, shown by itself.
GROUPS = {
    "instruction following": ("ifeval", "ifbench"),
    "role-play": (),
    "retrieval-augmented generation": ("instruct_passage", "chatrag"),
    "function calling": ("bfcl",),
}
OTHERS = "others"


def group_of(score: Score) -> str | None:
    """The group that a row belongs to; None: it is not shown (MT-Bench's other categories and single turns)."""
    if score.task == JUDGED:
        if score.name == ROLE_PLAY:
            return "role-play"
        return OTHERS if score.metric == "rating" else None
    for group, beginnings in GROUPS.items():
        if beginnings and score.task.startswith(beginnings):
            return group
    return OTHERS


def head(scores: list[Score]) -> list[tuple[str, str | None]]:
    """(group, name of a row) in the order of the table; None: nothing of the group was run.

    Args:
        scores: of all models.
    """
    by_group: dict[str, list[str]] = {}
    for score in scores:
        names = by_group.setdefault(group_of(score) or "", [])
        if score.name not in names:
            names.append(score.name)
    rows: list[tuple[str, str | None]] = []
    for group in GROUPS:
        rows += [(group, name) for name in by_group.get(group, [None])]  # type: ignore[list-item]
    return [*rows, *((OTHERS, name) for name in by_group.get(OTHERS, []))]
