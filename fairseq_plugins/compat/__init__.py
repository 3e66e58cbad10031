"""Every repair that fairseq (fairseq-fixed 0.12.3.1) needs today, each with its reason.

Importing this package makes them. Each calls the original function wherever that is possible.
"""

from fairseq_plugins.compat import errors, life, loading, processes, running, writing  # noqa: F401
