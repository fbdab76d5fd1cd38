"""`psft run` over fake commands: python run_fake.py PIPELINE.yaml OUTPUT"""

from __future__ import annotations

import sys
from pathlib import Path

from psft.pipelines import Executor, read_pipeline

FAKE = (sys.executable, str(Path(__file__).with_name("fake_psft.py")))

if __name__ == "__main__":
    sys.exit(Executor(read_pipeline(sys.argv[1]), Path(sys.argv[2]), program=FAKE).run())
