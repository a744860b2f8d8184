"""What every process of the tests begins with. The fixtures are in `shared_fixtures.py`, whose packages take
seconds to import: pytest-xdist's first process, which runs no test, does without."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
# Of the processes that tests start. Tensors are tiny: a second thread waits for the first, and takes a core.
os.environ["OMP_NUM_THREADS"] = "1"
# Temporary folders in memory: a disk writes a file out whenever another replaces it, seventy times a run.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


def pytest_addoption(parser):
    parser.addoption("--rewrite-trajectories", action="store_true", help="write tests/trajectories/ again")


def pytest_configure(config):
    # Before torch is imported. All other tests compare with the bits, the dtypes and the devices of a CPU.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    is_worker = hasattr(config, "workerinput")
    distributes = getattr(config.option, "dist", "no") != "no" and not is_worker
    if not distributes:
        config.pluginmanager.import_plugin("shared_fixtures")
