"""The scripts import one another by bare name, as `python benchmarks/...` finds them; under pytest too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
