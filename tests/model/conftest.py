"""Fixtures of this folder."""

import pytest
from small_models import small_batch, small_model


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch():
    return small_batch()
