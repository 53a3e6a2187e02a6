import pytest

from examples.demo import data as demo_data


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Small versions of the demo's real data sets. Tests copy what they damage."""
    out = tmp_path_factory.mktemp("demo")
    demo_data.write(out, limit=60)
    return out
