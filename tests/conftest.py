"""Teams of threads, made once: compiling and loading their kernels takes longer than most tests."""

import pytest


@pytest.fixture(scope="session")
def team():
    """Two threads."""
    from hybrid_kernels.team import Team  # noqa: PLC0415  # most tests of the runtime need none of it

    made = Team(2)
    yield made
    made.close()


@pytest.fixture(scope="session")
def lone_team():
    """The caller's thread alone."""
    from hybrid_kernels.team import Team  # noqa: PLC0415

    made = Team(1)
    yield made
    made.close()
