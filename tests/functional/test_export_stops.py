"""Which tokens end an answer: from the source's author, through SFT with another template, to the export and a chat."""

import json
import shutil
from pathlib import Path

import pytest

from tests.functional.conftest import Teacher
from tests.functional.test_align import align, conversation_files
from tests.support.commands import Commands


@pytest.mark.slow
def test_stop_tokens_of_the_source_and_of_the_template(
    commands: Commands, teacher: Teacher, tmp_path: Path
) -> None:
    """After tuning with a template of the user's, an export stops where the author's model did, and at its marker."""
    source, template = tmp_path / "source", tmp_path / "chat.jinja"
    shutil.copytree(teacher.huggingface, source)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 5, 9], "temperature": 0.6})
    )
    template.write_text(
        "{%- for m in messages -%}{{ m['role'] + ':' + m['content'] + pad_token }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
    )
    data = conversation_files(tmp_path / "conversations")
    made = [f"student={source}", f"align.chat_template={template}", "align.max_steps=1"]
    tuned = align(commands, teacher, data, "stops", *made)
    places = [f"source={tuned.run_dir}", f"to={tmp_path / 'hf'}", f"run_dir={tmp_path / 'run'}"]
    result = commands.run("export", "license=none", "export.verify_tokens=64", *places).result()
    assert result["stop_token_ids"] == [0, 5, 9, 1]
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["temperature"] == 0.6
    asked = [
        f"source={tmp_path / 'hf'}",
        "prompt=Hello",
        "chat.max_new_tokens=8",
        f"run_dir={tmp_path / 'chat'}",
    ]
    answer = commands.run("chat", *asked).result()
    assert answer["chat_template"]
    assert answer["last_answer_ended"] or answer["tokens"] == 8
