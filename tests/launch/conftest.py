"""Fixtures of the tests that start processes. They import inside, as `tests/conftest.py` says why."""

import pytest
import yaml


@pytest.fixture(scope="session")
def recipe_files(tiny_llama, toy_stream, tmp_path_factory):
    """Recipe files by method, each a program as well."""
    from launches import METHODS, PROGRAM, sections

    folder = tmp_path_factory.mktemp("recipes")
    for method in METHODS:
        text = PROGRAM.format(yaml.safe_dump(sections(tiny_llama, toy_stream, method)))
        (folder / f"{method}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def forked(tmp_path_factory):
    """Functions that start processes; none of them outlives the test."""
    from forked import Forked

    made = Forked(tmp_path_factory)
    yield made
    for started in made.started:
        started.kill()


@pytest.fixture
def launch(tmp_path):
    """Starts launch.sh where stubs stand for the commands that it looks for."""
    from stubbed import starter

    return starter(tmp_path)
