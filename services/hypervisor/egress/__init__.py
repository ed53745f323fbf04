"""A box's way to the network: its own namespace, and the gateway that decides by policy."""
