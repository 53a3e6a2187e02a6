"""Runs `pretrain.py` repeatedly in one process; stdin has the flags of a run a line, as JSON."""

import functools
import json
import sys

from mdm.train import pretraining
from pipelines import pretrain

if __name__ == "__main__":
    pretraining.train = functools.partial(pretraining.train, track=False)
    for line in sys.stdin:
        sys.argv = ["pretrain.py", *json.loads(line)]
        code = pretrain.main()
        print(f"\nexit code {code}", file=sys.stderr, flush=True)  # noqa: T201
