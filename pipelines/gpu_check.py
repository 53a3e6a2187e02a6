"""Check and measure the CUDA kernels: `make gpu-check`, on a machine with a GPU.

Installs the extra `gpu`, compares the fused kernels with the torch reference in fp32 and bf16, and
measures one block and a few training steps of `mdm_1b` and `mdm_7b`, with as many layers as fit,
against a stack of stock `mamba_ssm.Mamba2` blocks. Without a CUDA device it prints one line and
exits with 0.

**Not run** beyond that line so far: no machine with a GPU was available.
"""

from mdm.launch.job import job

import itertools
import sys
from pathlib import Path

import torch

from mdm.planning import gpu_check as check
from mdm.planning.gpu_check import Flags
from mdm.utils.command_line import parse_cli
from mdm.utils.files import write_json
from mdm.utils.gpu import peak_flops


@job("gpu_check")
def main() -> int:
    """Check, measure, report; 1 if a kernel differs."""
    flags = parse_cli(Flags, description=__doc__ or "")
    if not torch.cuda.is_available():
        print("not run: no CUDA device")
        return 0
    check.install()
    device = torch.cuda.get_device_name()
    kinds = itertools.product(check.TOLERANCE, (False, True))
    compared = [line for dtype, packed in kinds for line in check.parity(dtype, packed)]
    print(f"{device}\n\n{check.table(compared)}\n")
    peak = peak_flops(device, flags.peak_tflops)
    if peak is None:
        print(f"no bf16 peak known for {device}: give --peak_tflops for the MFU")
    measured = [line for name in check.MEASURED for line in check.check_preset(name, flags, peak)]
    print(check.table(measured))
    report = {"device": device, "torch": torch.__version__, "parity": compared, "speed": measured}
    write_json(Path(flags.out), report)
    return 0 if all(line["passed"] for line in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
