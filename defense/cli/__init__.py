"""The command line: the one place where the guard, the offline half and the server meet."""
