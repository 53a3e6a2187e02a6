import pytest

from mdm.utils.gpu import peak_flops


@pytest.mark.parametrize(
    ("name", "given", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 0.0, 989e12),
        ("NVIDIA H100 PCIe", 0.0, 756e12),
        ("NVIDIA GH200 480GB", 0.0, 989e12),
        ("NVIDIA L40S", 0.0, 362e12),
        ("NVIDIA L4", 0.0, 121e12),
        ("something new", 0.0, None),
        ("something new", 100.0, 100e12),
        ("NVIDIA H100 80GB HBM3", 100.0, 100e12),
    ],
)
def test_the_peak_is_as_given_or_by_name(name, given, peak):
    assert peak_flops(name, given) == peak
