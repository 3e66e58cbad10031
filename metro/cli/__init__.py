"""The `metro` command: one file per sub-command, which parses and calls the library."""
