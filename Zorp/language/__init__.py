"""The language policies are written in: who calls, names that star imports leaked, what is not built yet."""
