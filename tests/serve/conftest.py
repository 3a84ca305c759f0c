"""One model and one server for all tests of this folder."""

import pytest
from servers import client_of, serving

import kimi_linear as kl


@pytest.fixture(scope="session")
def model():
    with kl.load(device="cpu", dtype="f32", max_context=512, max_batch=8) as m:
        yield m


@pytest.fixture(scope="session")
def served(model):
    with serving(model) as s:
        yield s


@pytest.fixture(scope="session")
def client(served):
    with client_of(served) as c:
        yield c
