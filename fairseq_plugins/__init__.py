"""METRO for fairseq: pass this folder as `--user-dir` (or `common.user_dir`) to fairseq's commands.

Importing it registers the tasks, models and criterion under their published names and applies the
repairs of `compat`. Everything that computes lives in `metro`; here options are translated, modules
called and sums logged.
"""

from fairseq_plugins import compat
from fairseq_plugins.adam import use_fused_adam

compat.apply()
use_fused_adam()

from fairseq_plugins import criterions, models, tasks  # noqa: E402, F401
