"""Generated from protos/voidbox/common; see `make protos`."""
