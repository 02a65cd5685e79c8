"""What tests of runs share: a dense model, prepared text, one finished run."""

from pathlib import Path

import pytest

from tests.lightning_modules.block_sparsity.runs import data_of, fit, module_of
from tests.lightning_modules.block_sparsity.toy import save_tiny


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def fitted(dense, data_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    data_of(data_cache)
    module = module_of(dense, folder / "out")
    return module, fit(module, data_cache, folder), folder
