"""Peak speeds of GPUs."""

# Dense bf16 tensor-core peak in 1e12 FLOP/s by a part of the device's name, from data sheets.
# The first match counts.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
}


def peak_flops(name: str, given_tflops: float = 0.0) -> float | None:
    """Peak bf16 FLOP/s of the device `name`; `given_tflops` takes precedence unless it is 0.

    None if it is neither given nor known.
    """
    if given_tflops > 0:
        return 1e12 * given_tflops
    return next((1e12 * peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)
