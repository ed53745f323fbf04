"""Micro-VMs: one confined group of processes per box."""
