"""Generated from protos/voidbox/imager; see `make protos`."""
