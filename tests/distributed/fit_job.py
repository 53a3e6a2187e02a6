"""`pretrain.py` again and again in one process: the flags of each are a line of JSON on stdin."""

import functools
import json
import sys

from pipelines import pretrain

if __name__ == "__main__":
    pretrain.train = functools.partial(pretrain.train, track=False)
    for line in sys.stdin:
        sys.argv = ["pretrain.py", *json.loads(line)]
        code = pretrain.main()
        print(f"\nexit code {code}", file=sys.stderr, flush=True)  # noqa: T201
