"""`dapo` with the stand-in instead of the training job: `python run_standin.py run CONFIG key=value ...`"""

import sys
from pathlib import Path

from dapo.cli import main
from dapo.runtime import ray_job

ray_job.RayJob.__init__.__kwdefaults__["entrypoint"] = (str(Path(__file__).parent / "standin_job.py"),)

if __name__ == "__main__":
    sys.exit(main())
