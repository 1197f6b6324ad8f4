"""What a restore on other ranks costs before it reads data: the votes of 1,024 ranks are looked at for one rank's plan.

    make bench-resharding [ARGS="--ranks 1024 --records 10000"]

And the size of an index, for each record and tensor.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import output
from benchmarks.processes import run_child
from fastckpt.format import records
