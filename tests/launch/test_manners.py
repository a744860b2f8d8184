"""What a fresh process prints: its own words, and no other library's."""

import re
import subprocess
import sys

import pytest

from codyra_llm.core.version import __version__


def said(*words: str, before: str = "") -> subprocess.CompletedProcess:
    """A command in a process of its own, after the line of Python `before`."""
    program = f"{before}\nfrom codyra_llm.cli import main\nmain({list(words)!r})"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_a_plan_is_all_that_is_said():
    """Though bitsandbytes is imported on the way, which misses a kernel on some CPUs, and a library warns its
    developers."""
    noise = (
        "import sys, types\n"
        "import codyra_llm.experiment.plan as plan\n"
        "def noisy(recipe, console, inner=plan.plan):\n"
        "    import warnings, logging\n"
        "    import bitsandbytes\n"
        "    warnings.warn('torch.distributed.x will change', FutureWarning)\n"
        "    logging.getLogger('bitsandbytes.backends.cpu.ops').warning(\n"
        "        'Failed to load CPU gemm_4bit_forward from kernels-community: %s', 'nothing')\n"
        "    inner(recipe, console)\n"
        "plan.plan = noisy"
    )
    done = said("plan", "quickstart", before=noise)
    assert done.returncode == 0 and done.stderr == ""
    begins = (
        r"mini \(llama, \S+ M parameters, \w+\); method codyra_drift trains \S+ M parameters trace protocol"
    )
    assert re.match(begins, " ".join(done.stdout.split()))
    assert done.stdout.splitlines()[-1].startswith("disk, at most: ")
    assert not re.search(r"Loading|Warning|%\||it/s|kernels", done.stdout)


def test_models_load_without_a_bar(tiny_llama):
    done = said("generate", str(tiny_llama), "Say A:", "--max-new-tokens", "2")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["run", "--help"], "codyra-llm run [OPTIONS] {RECIPE} [KEY=VALUE ...] "),
        (["report", "--help"], "codyra-llm report [OPTIONS] {RUN|SWEEP ...} "),
        (["recipe", "init", "--help"], "codyra-llm recipe init [OPTIONS] [FILE] "),
    ],
)
def test_usage_says_once_what_may_be_repeated(words, usage):
    assert usage in said(*words).stdout


def test_version_and_completion():
    done = said("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"codyra-llm {__version__}\n", "")
    # Named, since a test's process may have no shell above it to be found.
    named = "import os\nos.environ['_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION'] = '1'"
    done = said("--show-completion", "bash", before=named)
    assert done.returncode == 0 and "_CODYRA_LLM_COMPLETE" in done.stdout
