import pytest

from examples.demo import data as demo_data


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The three real sets, small, as the demo writes them. Tests copy what they break."""
    out = tmp_path_factory.mktemp("demo")
    demo_data.write(out, limit=60)
    return out
