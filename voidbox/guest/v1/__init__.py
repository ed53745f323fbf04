"""Generated from protos/voidbox/guest; see `make protos`."""
