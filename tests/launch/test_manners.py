"""What a fresh process prints: its own words, and no other library's."""

import re
import subprocess
import sys

import pytest
from helpers import call

from codyra_llm.core.version import __version__


def said(*words: str, before: str = "") -> subprocess.CompletedProcess:
    """A command in a process of its own, after the line of Python `before`."""
    program = f"{before}\nfrom codyra_llm.cli import main\nmain({list(words)!r})"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_a_plan_and_an_answer_are_all_that_is_said(tiny_llama):
    """Weights load without a bar. A plan says nothing else, though bitsandbytes is imported on the way, which
    misses a kernel on some CPUs, and a library warns its developers."""
    before = (
        "from codyra_llm.cli import main\n"
        f"try: main(['generate', {str(tiny_llama)!r}, 'Say A:', '--max-new-tokens', '2'])\n"
        "except SystemExit as end: assert not end.code\n"
        "import codyra_llm.experiment.plan as plan\n"
        "def noisy(recipe, console, inner=plan.plan):\n"
        "    import warnings, logging\n"
        "    import bitsandbytes\n"
        "    warnings.warn('torch.distributed.x will change', FutureWarning)\n"
        "    logging.getLogger('bitsandbytes.backends.cpu.ops').warning(\n"
        "        'Failed to load CPU gemm_4bit_forward from kernels-community: %s', 'nothing')\n"
        "    inner(recipe, console)\n"
        "plan.plan = noisy\n"
    )
    done = said("plan", "quickstart", before=before)
    assert done.returncode == 0 and done.stderr == ""
    answer, *planned = done.stdout.splitlines()
    begins = (
        r"mini \(llama, \S+ M parameters, \w+\); method codyra_drift trains \S+ M parameters trace protocol"
    )
    assert answer and re.match(begins, " ".join(" ".join(planned).split()))
    assert planned[-1].startswith("disk, at most: ")
    assert not re.search(r"Loading|Warning|%\||it/s|kernels", done.stdout)


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["run", "--help"], "codyra-llm run [OPTIONS] {RECIPE} [KEY=VALUE ...] "),
        (["report", "--help"], "codyra-llm report [OPTIONS] {RUN|SWEEP ...} "),
        (["recipe", "init", "--help"], "codyra-llm recipe init [OPTIONS] [FILE] "),
    ],
)
def test_usage_says_once_what_may_be_repeated(words, usage, capsys):
    code, out, _ = call(capsys, *words)
    assert code == 0 and usage in out


def test_the_version():
    done = said("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"codyra-llm {__version__}\n", "")


def test_completion(monkeypatch, capsys):
    # The shell is named, since a test's process may have no shell above it to be found.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = call(capsys, "--show-completion", "bash")
    assert code == 0 and "_CODYRA_LLM_COMPLETE" in out
