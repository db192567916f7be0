"""Runs recipes one after another as refusals.py does, but in forks of a process that has imported NeMo.

python in_turn.py < cases.json > answers.json
"""

import json
import sys

from tests.functional.refusals import answer

if __name__ == "__main__":
    import nemo_minitron.nemo.distillation
    import nemo_minitron.nemo.session
    import nemo_minitron.nemo.training

    assert nemo_minitron.nemo.distillation
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]))
