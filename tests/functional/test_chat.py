"""recipes/chat.py as a user types it."""

from tests.functional.conftest import Pruned
from tests.support.commands import Commands


def test_a_student_goes_on_with_a_prompt(commands: Commands, pruned: Pruned) -> None:
    """A Megatron checkpoint, without a chat template: its text streams to stdout, before the numbers and the path."""
    run_dir = commands.home / "chat-run"
    asked = [f"source={pruned.run_dir}", "prompt=import os", "chat.max_new_tokens=6", f"run_dir={run_dir}"]
    ended = commands.run("chat", *asked)
    result = ended.result()
    assert (result["engine"], result["chat_template"], result["answers"]) == ("transformers", False, 1)
    assert 1 <= result["tokens"] <= 6
    assert ended.stdout.startswith(result["last_answer"])
    assert "no chat template" in ended.stderr
    assert ended.stdout.splitlines()[-2].startswith("chat: ")
    refused = commands.run(
        "chat", f"source={pruned.run_dir}", "chat.system=Be brief.", f"run_dir={run_dir}-2"
    )
    assert refused.code == 2
    assert refused.stderr.splitlines()[-1].startswith("error: chat.system: the model has no chat template")
    assert not (commands.home / "chat-run-2").exists()
