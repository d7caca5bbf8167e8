"""The option of `pytest benchmarks`."""


def pytest_addoption(parser):
    parser.addoption(
        "--full-shapes",
        action="store_true",
        help="benchmark every declared shape, not one tiny case an op",
    )
