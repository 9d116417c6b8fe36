"""Has each Python process that finds this folder on its path read the control groups of a made-up machine."""

import functools
import os
from pathlib import Path

from spectrumkv.common.service import cgroup

if "MADE_UP_MACHINE" in os.environ:
    root = Path(os.environ["MADE_UP_MACHINE"])
    cgroup.memory_limit = functools.partial(cgroup.memory_limit, root)
    cgroup.processor_limit = functools.partial(cgroup.processor_limit, root)
