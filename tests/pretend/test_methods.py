"""Every method trains on a device that is not there: no devices are mixed, the host waits as seldom as it may, and
nothing of a model outlives its task.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codyra_llm.config.registry import METHODS

TESTS = Path(__file__).parents[1]
START = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1])  # before anything asks PyTorch for its devices
import run_pretended
run_pretended.main()
"""
