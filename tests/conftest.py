import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import s3server

pytest_plugins = ["tests.support.parallel"]

# No deadline: a loaded machine is no failure. print_blob: a failing example can be run again from the log alone.
settings.register_profile("fastckpt", deadline=None, print_blob=True, derandomize=False)
settings.load_profile("fastckpt")

# A shell that starts a job in the background has it ignore SIGINT, and Python then installs no handler: tests of Ctrl-C would test nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    choice = s3server.choose()
    return f"tests against S3: {choice.kind or 'skipped'} ({choice.why})"


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[s3server.S3Server]:
    """The S3 server of this run, started when the first test asks for it. Its logs are kept if a test failed."""
    choice = s3server.choose()
    if choice.kind is None:
        pytest.skip(choice.why)
    server = s3server.start(choice.kind)
    failed_before = request.session.testsfailed
    try:
        yield server
    finally:
        server.stop(keep_logs=request.session.testsfailed > failed_before)
