"""The agent that runs inside a micro-VM; imports nothing of the host."""
