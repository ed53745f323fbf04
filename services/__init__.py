"""Host services; each package is one process."""
