"""Exports need no DeepSpeed."""

import subprocess
import sys

from tests.helpers import ROOT


def test_exporting_and_generating_need_no_deepspeed():
    code = (
        "import sys; sys.modules['deepspeed'] = None; sys.path.insert(0, '.');"
        "import pipelines.export, pipelines.checkpoints, pipelines.generate"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
