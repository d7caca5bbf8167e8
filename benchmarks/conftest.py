"""The options of `pytest benchmarks`. Without pytest-benchmark there is nothing to measure with, and everything is skipped."""

from pathlib import Path

import pytest

PLUGIN = "benchmark"
HERE = Path(__file__).parent


def pytest_addoption(parser, pluginmanager):
    parser.addoption(
        "--full-shapes", action="store_true", help="benchmark every declared shape, not one tiny case an op"
    )
    if not pluginmanager.hasplugin(PLUGIN):
        parser.addoption("--benchmark-only", action="store_true", help="wants pytest-benchmark")


def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin(PLUGIN):
        reason = 'wants pytest-benchmark: pip install "stackbert-kernels[test]"'
        for item in (item for item in items if item.path.parent == HERE):
            item.add_marker(pytest.mark.skip(reason=reason))
