from pathlib import Path

import pytest
from simt import twin as host


@pytest.fixture(scope="session")
def twin(request):
    given = request.config.getoption("--twin")
    return host.load(Path(given) if given else host.build(host.ROOT / "build" / "simt"))
