"""Generated from protos/voidbox/orchestrator; see `make protos`."""
