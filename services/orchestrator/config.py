"""How the orchestrator is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.common.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Turns specs into runs, and runs them in boxes."""

    listen: str | None = setting(None, "where to listen: unix:/path or tcp://host:port")
    token_file: Path | None = setting(None, "file with the token that TCP callers must send")
    hypervisor: str | None = setting(None, "address of the hypervisor")
    imager: str | None = setting(None, "address of the imager")
    peer_token_file: Path | None = setting(None, "file with the token for hypervisor and imager over TCP")
    max_parallel_boxes: int = setting(0, "boxes of one run at once; 0: the smaller of 4 and the CPUs")
    max_event_mib: int = setting(16, "output that one run's log may hold; the whole is kept as artifacts")
    max_stream_mib: int = setting(256, "output that is kept of one program, for each stream")
    max_artifact_mib: int = setting(1024, "largest file or tree that is uploaded or taken out of a box")
    log_level: str = setting("info", "debug, info, warning or error", env=("VOIDBOX_LOG_LEVEL",))
