"""Generated from protos/voidbox/hypervisor; see `make protos`."""
