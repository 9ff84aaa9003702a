"""Fixtures for all tests. Modules beside this file (`tiny_pipeline`) can be imported by every test."""

import pytest


@pytest.fixture(scope="session")
def pipeline():
    """Random, very small networks behind the real `Pipeline`. Do not change it; build your own with `tiny_pipeline.random_pipeline`."""
    from tiny_pipeline import random_pipeline

    return random_pipeline()
