"""Long runs that prove that nothing leaks: `make soak`."""
