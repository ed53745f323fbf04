"""What holds for all tests: examples may take as long as a busy machine takes, and children are spawned."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# As the services do it, before grpc is imported: else its threads start in a child between fork and exec.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
