"""The embedded stack: the three services of one user on one host, started on demand.

`lifecycle` is what clients call; `supervisor` is the background process (`python -m
voidbox.stack`) that keeps imager, hypervisor and orchestrator running on unix sockets.
"""
