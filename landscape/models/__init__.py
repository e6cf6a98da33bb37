"""Reference models of the paper, written to be read alone."""
