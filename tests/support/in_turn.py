"""Runs recipes one after another as refusals.py does, but in forks of a process that has imported NeMo.

python in_turn.py < cases.json > answers.json
"""

import json
import sys

from tests.support.refusals import answer

if __name__ == "__main__":
    import nemo_minitron.nemo.distill_transform
    import nemo_minitron.nemo.fit
    import nemo_minitron.nemo.session

    assert nemo_minitron.nemo.distill_transform
    print(json.dumps([answer(case) for case in json.load(sys.stdin)]))
