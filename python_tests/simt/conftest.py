import pytest
from simt import twin as host


@pytest.fixture(scope="session")
def twin():
    return host.build(host.ROOT / "build" / "simt")
