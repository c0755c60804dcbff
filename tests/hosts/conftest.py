"""A network of the hosts of a module."""

from collections.abc import Iterator

import pytest

from tests.hosts.network import Network


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with Network(request.module.HOSTS) as network:
        yield network
